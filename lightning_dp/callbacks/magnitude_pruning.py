"""Pruning by magnitude: only the largest weights train, by masks from public weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.callbacks._strategy import private_strategy
from lightning_dp.masks import MagnitudeMask, magnitude_masks, prunable_names, public_weights
from lightning_dp.masks.magnitude import NOT_PUBLIC
from lightning_dp.masks.random import check_seed
from lightning_dp.system.local import local_part, own_rows, whole_of


class MagnitudePruning(Callback):
    """A callback that trains only the largest weights; all others are set to 0 or keep their value.

        m = 1 on the largest |w|;   "prune": theta_0 = m theta;   g_i <- m g_i before clipping, noise only where m = 1

    The masks are computed from public weights, are the same for all samples and ranks, and are saved in checkpoints.
    Prunable weights are trainable, have two dimensions or more, and belong to a private optimizer: matrices, kernels,
    embeddings, but not biases and norm layers. After every optimizer step the removed weights are reset, so that
    neither momentum nor weight decay moves them.

    **Guarantee**: the accountant is unchanged, because the masks are public (initial or publicly trained weights) or
    post-processing of noisy weights of this run. NOT private: weights that were trained on the private data without
    differential privacy, as initial weights or in ``reference``. Such weights cannot be detected. Weights of another
    private run add its epsilon.

    Args:
        amount: fraction of the prunable weights to remove, in (0, 1); of P weights, ``int(amount P)`` are removed.
        source: "initial" (the weights at the start of the run), "public" (``reference``), or "noisy" (the weights of
            this run after every ``every_n_epochs`` epochs; dense until the first).
        scope: "global" ranks all prunable weights together, "layer" each tensor separately.
        mode: "prune" sets removed weights to 0, "freeze" keeps their values.
        scores: "magnitude", or "random" for a control run.
        every_n_epochs: epochs between two masks, >= 1; required for source="noisy", else not allowed.
        reference: parameter's name -> weights trained on public data; required for source="public", else not allowed.
        seed: public seed of the random scores, >= 0.

    Raises:
        ValueError: for arguments out of range or that do not belong together, a reference that does not fit the module,
            or a module without prunable weights.
        TypeError: for data, modules or callables as scores, or when the Trainer's strategy is not a private one.

    Example:
        >>> pruning = MagnitudePruning(0.5, mode="freeze")

    References:
        Watson et al. 2023, Inference and Interference, arXiv 2311.06839.
    """

    def __init__(
        self,
        amount: float,
        *,
        source: Literal["initial", "public", "noisy"] = "initial",
        scope: Literal["global", "layer"] = "global",
        mode: Literal["prune", "freeze"] = "prune",
        scores: Literal["magnitude", "random"] = "magnitude",
        every_n_epochs: int | None = None,
        reference: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.amount = check.check_probability("amount", amount)
        if not isinstance(source, str):
            raise TypeError(f"Expected source to be a name, got source={type(source).__name__}. {NOT_PUBLIC}")
        self.source = check.check_choice("source", source, ("initial", "public", "noisy"))
        self.scope = check.check_choice("scope", scope, ("global", "layer"))
        self.mode = check.check_choice("mode", mode, ("prune", "freeze"))
        if not isinstance(scores, str):
            raise TypeError(f"Expected scores to be a name, got scores={type(scores).__name__}. {NOT_PUBLIC}")
        self.scores = check.check_choice("scores", scores, ("magnitude", "random"))
        if (source == "noisy") != (every_n_epochs is not None):
            raise ValueError(
                f"Expected every_n_epochs with source='noisy' and with no other, got every_n_epochs={every_n_epochs!r} "
                f"with source={source!r}. Only noisy weights are looked at again."
            )
        self.every_n_epochs = None if every_n_epochs is None else check.check_count("every_n_epochs", every_n_epochs)
        if reference is not None and not isinstance(reference, Mapping):
            raise TypeError(
                f"Expected reference to be a state dict, got reference={type(reference).__name__}. {NOT_PUBLIC}"
            )
        if (source == "public") != (reference is not None):
            raise ValueError(
                "Expected reference with source='public' and with no other, got "
                f"reference={reference and 'a state dict'!r} with source={source!r}. Pass both or neither."
            )
        self.reference = reference
        self.seed = check_seed(seed)
        self._mask, self._draws = MagnitudeMask(), 0
        self._held: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        self._hooks: list[RemovableHandle] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Pass the mask to the strategy when fit begins; a new run begins without masks."""
        if stage == "fit":
            if trainer.global_step == 0:
                self._mask, self._draws = MagnitudeMask(), 0
            # a function, because a checkpoint loaded later may replace the mask
            private_strategy(trainer, self).mechanisms.add(self, mask=lambda length: self._mask)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the masks when training begins, unless a checkpoint has them or the source is "noisy"."""
        if self._draws == 0 and self.source != "noisy":
            self._draw(trainer, pl_module, draws=1)
        self._hold(pl_module)
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(self._restore))

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the masks when an epoch begins, if an interrupted run left them due."""
        self._draw_if_due(trainer, pl_module, trainer.current_epoch)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute masks from the noisy weights when an epoch ends, if they are due."""
        self._draw_if_due(trainer, pl_module, trainer.current_epoch + 1)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release references to weights and optimizers when a stage ends."""
        self._let_go()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release references to weights and optimizers when a run is interrupted."""
        self._let_go()

    @property
    @override
    def state_key(self) -> str:
        """Key of the state in checkpoints; it differs between callbacks with different settings."""
        names = ("amount", "source", "scope", "mode", "scores", "every_n_epochs", "seed")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the masks, eight coordinates per byte, and the number of draws."""
        return {"mask": self._mask.state_dict(), "draws": self._draws}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the masks and the number of draws when a run resumes."""
        self._mask, self._draws = MagnitudeMask.from_state_dict(state_dict["mask"]), state_dict["draws"]

    def _draw_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epochs_done: int) -> None:
        due = 0 if self.every_n_epochs is None else epochs_done // self.every_n_epochs
        if due > self._draws:
            self._draw(trainer, pl_module, draws=due)
            self._hold(pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, draws: int) -> None:
        parameters = private_strategy(trainer, self).private_parameters()
        prunable = [name for name in prunable_names(pl_module) if name in parameters]
        if not prunable:
            raise ValueError(
                "Expected trainable weights of two dimensions or more with MagnitudePruning, got a module without any "
                "that a private optimizer holds. Unfreeze some, or leave the callback out."
            )
        weights: Mapping[str, Tensor] = {name: whole_of(parameters[name]) for name in prunable}
        if self.reference is not None:
            weights = public_weights(self.reference, {name: parameters[name] for name in prunable})
        masks = magnitude_masks(weights, self.amount, self.scope, prunable, self.scores, self.seed)
        self._mask.replace({name: mask.to(parameters[name].device) for name, mask in masks.items()})
        self._draws = draws

    @torch.no_grad()
    def _hold(self, pl_module: pl.LightningModule) -> None:
        """Record the removed weights with the values that they keep, and set these values."""
        parameters = dict(pl_module.named_parameters())
        self._held = []
        for name, mask in self._mask.masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                raise ValueError(
                    "Expected the module that the masks in the checkpoint were drawn for, got none or another shape "
                    f"for {name!r}. Resume with the same module."
                )
            parameter = parameters[name]
            value = local_part(parameter).detach().clone() if self.mode == "freeze" else None
            removed = own_rows(mask.logical_not(), parameter).to(parameter.device)
            self._held.append((parameter, removed, value))
        self._restore()

    @torch.no_grad()
    def _restore(self, *_: object) -> None:
        """Reset removed weights after each optimizer step."""
        for parameter, removed, value in self._held:
            part = local_part(parameter)
            if value is None:
                part.masked_fill_(removed, 0)
            else:
                part.copy_(torch.where(removed, value, part))

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._held = [], []
