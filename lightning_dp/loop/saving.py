"""Saving and loading of a loop's privacy state, and its comparison with model and optimizer."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_dp.errors import PrivacyError
from lightning_dp.step import checkpoint as saved
from lightning_dp.step.history import note_checkpoint
from lightning_dp.step.settings import Settings
from lightning_dp.step.state import PrivacyState


def dump(model: nn.Module, optimizer: Optimizer, state: PrivacyState) -> dict[str, Any]:
    """Return the privacy state as plain values, with the optimizer's step count and a digest of the weights."""
    steps = saved.most_steps(optimizer.state.values())
    return {**state.state_dict(global_step=steps), saved.WEIGHTS: digest(model)}


def load(state: PrivacyState, loaded: Any) -> None:
    """Restore the privacy state of a saved run.

    Raises:
        PrivacyError: a damaged state, or one of another run.
    """
    steps = loaded.get("global_step") if isinstance(loaded, dict) else None
    state.load({saved.KEY: loaded, "global_step": steps}, allow_public=False, one_step_a_batch=False)


def note_loaded(model: nn.Module, loaded: dict[str, Any] | None) -> None:
    """Record whose weights a model holds if they were saved with a loaded state."""
    if loaded is not None and loaded.get(saved.WEIGHTS) == digest(model):
        note_checkpoint(model, {saved.KEY: loaded})


def check_loaded(
    model: nn.Module, optimizer: Optimizer, state: PrivacyState, loaded: dict[str, Any] | None, settings: Settings
) -> None:
    """Check that model and optimizer were not trained for more steps than the ledger holds.

    Raises:
        PrivacyError: the weights are not those that were saved with the ledger, or the optimizer has taken steps that
            the ledger does not hold.
    """
    taken = saved.most_steps(optimizer.state.values())
    if loaded is not None and loaded.get(saved.WEIGHTS) != digest(model):
        raise PrivacyError(
            "The weights are not those that the loaded privacy state was saved with, so they may have been trained "
            "for more steps than the ledger holds. Load model, optimizer and privacy state of one moment."
        )
    known = state.ledger.num_steps + state.unledgered if loaded is None else int(loaded["global_step"])
    if taken > known and not settings.allow_public_checkpoint:
        raise PrivacyError(
            f"The optimizer has taken {taken} steps and the ledger knows of {known}, so epsilon would be understated. "
            "Call load_state_dict with the privacy state of the same moment, or pass allow_public_checkpoint=True if "
            "these steps never saw the private data."
        )
    if loaded is None:
        state.note_unledgered(taken, ())


def digest(model: nn.Module) -> str:
    """Return a digest of the bits of all trainable weights."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
