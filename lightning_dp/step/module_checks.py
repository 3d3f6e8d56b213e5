"""Checks of the user's module and optimizers, before any data is touched."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_dp._replacements import can_replace
from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.independence import find_unsupported
from lightning_dp.system.torch_private import Layers


def check_module(module: nn.Module, *, runs_samples_alone: bool) -> None:
    """Refuse a module that cannot be trained privately in its current state."""
    check_parameters(module)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"Expected {type(module).__name__} to have trainable parameters, got none with requires_grad=True. "
            "Unfreeze at least one, or train without a private strategy."
        )
    check_layers(module, runs_samples_alone=runs_samples_alone)


class LayerChecks:
    """Checks of a module, repeated once a layer is frozen, thawed or switched between training and evaluation.

    Args:
        module: the user's.
        runs_samples_alone: whether layers that mix samples are allowed, because every sample runs alone.
    """

    def __init__(self, module: nn.Module, *, runs_samples_alone: bool) -> None:
        self._module, self._alone = module, runs_samples_alone
        self._layers = Layers(module)
        self._flags: list[bool] = []

    def check(self) -> None:
        """Check the module if a flag has changed; later, everything may be frozen between two batches."""
        layers = self._layers.now()
        flags = [layer.training for layer in layers.all]
        flags += [parameter.requires_grad for parameter in layers.parameters()]
        if flags != self._flags:
            check = check_layers if self._flags else check_module
            check(self._module, runs_samples_alone=self._alone)
            self._flags = flags


def check_parameters(module: nn.Module) -> None:
    """Refuse modules without parameters, and lazy parameters."""
    if next(module.parameters(), None) is None:
        raise ValueError(
            f"Expected {type(module).__name__} to have trainable parameters, got no parameters at all. Make them in "
            "__init__, setup or configure_model, or train without a private strategy."
        )
    lazy = [name for name, parameter in module.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"Expected parameters with a shape, got {lazy[0]!r} of a lazy layer that has not run yet. Give the layer "
            "its sizes, or run the module once on data that is public before fit."
        )


def check_layers(module: nn.Module, *, runs_samples_alone: bool) -> None:
    """Refuse layers that, in their current mode, mix samples or store statistics about samples."""
    found = find_unsupported(module, runs_samples_alone=runs_samples_alone)
    if found:
        listed = "; ".join(
            f"{name or type(layer).__name__} ({type(layer).__name__}): {why}" for name, layer, why in found[:5]
        )
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise PrivacyError(
            f"Expected layers that treat each sample alone, got {listed.rstrip('.')}{more}.{_offer(found)}"
        )


def _offer(found: list[tuple[str, nn.Module, str]]) -> str:
    """Return advice to use ``fix``; empty if it can replace none of the layers, or all need another way out."""
    fixed = sum(can_replace(layer) and "lightning_dp.fix" in why for _, layer, why in found)
    if not fixed:
        return ""
    which = "them" if fixed == len(found) else f"{fixed} of these {len(found)}"
    return (
        " `module, changes = lightning_dp.fix(module)` before the optimizer is made, or `DPStrategy(fix=True)`, "
        f"replaces {which} and says what it changed."
    )


def check_optimizers(optimizers: list[Optimizer], module: nn.Module, public: tuple[int, ...]) -> None:
    """Refuse optimizers that cannot be private: foreign parameters, LBFGS, SparseAdam or wrong
    ``public_optimizers``.
    """
    for index in public:
        if index >= len(optimizers):
            raise ValueError(
                f"Expected public_optimizers below {len(optimizers)}, got public_optimizers={public!r}. "
                f"configure_optimizers returned {len(optimizers)} optimizer(s), counted from 0."
            )
    if optimizers and len(set(public)) == len(optimizers):
        raise ValueError(
            f"Expected at least one private optimizer, got public_optimizers={public!r} of {len(optimizers)}. With "
            "every optimizer public nothing is private: leave out the one that sees the data."
        )
    known = {id(parameter) for parameter in module.parameters()}
    owner: dict[int, int] = {}
    for index, optimizer in enumerate(optimizers):
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "Expected an optimizer that takes one gradient per step, got LBFGS. It runs its closure many times on "
                "one batch, each a release of its own: use SGD, Adam or AdamW."
            )
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise ValueError(
                "Expected an optimizer for dense gradients, got SparseAdam. Noise is on every coordinate, so a "
                "private gradient is never sparse: use Adam, and Embedding(sparse=False)."
            )
        for group in optimizer.param_groups:
            for position, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    raise ValueError(
                        f"Expected every parameter of {type(optimizer).__name__} to be one of the module's, got one of "
                        f"shape {tuple(parameter.shape)} at position {position} that is not. It would never get a "
                        "private gradient (was the module moved, wrapped or replaced after the optimizer was made?): "
                        "pass self.parameters()."
                    )
                other = owner.setdefault(id(parameter), index)
                if (other in public) != (index in public):
                    raise ValueError(
                        "Expected each parameter in private optimizers or in public ones, got one of shape "
                        f"{tuple(parameter.shape)} in optimizers {other} and {index} with "
                        f"public_optimizers={public!r}. Give it to one of them."
                    )
