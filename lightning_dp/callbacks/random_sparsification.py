"""Random sparsification of the gradient during training."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.callbacks._strategy import private_strategy, write_to_loggers
from lightning_dp.masks import RandomMask
from lightning_dp.masks.random import COOLINGS, Cooling, check_cooling, check_rate, check_seed
from lightning_dp.run_length import RunLength


class RandomSparsification(Callback):
    """A callback that leaves out a random set of gradient coordinates, which by default grows during training.

        g_i[Z] = 0 before clipping,   noise[Z] = 0,   |Z| = int(r P),   r = final_rate * schedule(progress)

    Clipping then keeps more of the active coordinates, the noise has (1 - r) of its energy, and the all-reduce of
    several processes carries active coordinates only. The set is the same for all samples and ranks. It is drawn again
    at every ``refresh``, always between two logical steps. If the mask changes, ``privacy/sparsification_rate`` (the
    fraction that this callback masks) and ``communication/bytes_per_step`` (of one rank) are logged.

    **Guarantee**: the mask depends on ``seed`` and the step only. It is public randomness, so the ledger does not
    change: sparsification costs no privacy and gives no amplification. A resumed run has the same masks if its planned
    length is the same.

    Use SGD, the tested pairing: Adam's second moment decays on masked coordinates, so their next updates explode.
    A learning-rate decay also gives less noise and less progress per step, so the fair control is dense training with a
    decay.

    Args:
        final_rate: fraction r* of coordinates left out in the end, in [0, 1); 0 is the dense control.
        schedule: "linear" (gradual cooling: dense at first), "cosine", "constant", or a callable from the progress of
            the run in [0, 1] to a fraction of ``final_rate`` in [0, 1].
        refresh: "epoch", or the number of logical steps that share a mask.
        scope: "global" draws from all coordinates at once, "layer" the same fraction in each parameter tensor.
        seed: public seed of the masks, >= 0.

    Raises:
        ValueError: for arguments out of range, or if the schedule needs a run length that is unknown.
        TypeError: for arguments of the wrong kind, or when the Trainer's strategy is not a private one.

    Example:
        >>> sparsification = RandomSparsification(final_rate=0.9)

    References:
        Zhu & Blaschko 2023, Improving Differentially Private SGD via Randomly Sparsified Gradients, TMLR, arXiv
        2112.00845.
    """

    def __init__(
        self,
        final_rate: float,
        *,
        schedule: Literal["linear", "cosine", "constant"] | Cooling = "linear",
        refresh: Literal["epoch"] | int = "epoch",
        scope: Literal["global", "layer"] = "global",
        seed: int = 0,
    ) -> None:
        self.final_rate = check_rate(final_rate)
        self.schedule = check_cooling(schedule)
        self.refresh: str | int = (
            check.check_choice("refresh", refresh, ("epoch",))
            if isinstance(refresh, str)
            else check.check_count("refresh", refresh, "Pass 'epoch' or a number of steps, 1 or above.")
        )
        self.scope = check.check_choice("scope", scope, ("global", "layer"))
        self.seed = check_seed(seed)
        self._mask: RandomMask | None = None
        self._seen: tuple[int, Hashable] = (0, None)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Pass the mask to the strategy when fit begins; each logical batch reads the mask once."""
        if stage == "fit":
            private_strategy(trainer, self).mechanisms.add(self, mask=self._make_mask)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the current step when training begins; changes of the mask are logged from then on."""
        self._seen = (private_strategy(trainer, self).steps_taken, None)

    def _make_mask(self, length: RunLength) -> RandomMask:
        refresh_steps, num_refreshes = self._refreshes(length)
        self._mask = RandomMask(
            self.final_rate,
            schedule=self.schedule,
            refresh_steps=refresh_steps,
            num_refreshes=num_refreshes,
            scope=self.scope,
            seed=self.seed,
        )
        return self._mask

    def _refreshes(self, length: RunLength) -> tuple[int, int]:
        """Return the number of steps that share a mask and the number of refreshes until the final rate."""
        if isinstance(self.refresh, int):
            refresh_steps = self.refresh
        else:
            advice = "Pass the number of steps that share a mask: refresh=100."
            refresh_steps = length.epoch_steps("RandomSparsification(refresh='epoch')", advice)
        if self.schedule is COOLINGS["constant"]:
            return refresh_steps, 1
        steps = length.total_steps("RandomSparsification", ", or pass schedule='constant'")
        return refresh_steps, max(1, math.ceil(steps / refresh_steps))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the masked fraction and the bytes per step when a training batch ends, if the mask has changed."""
        strategy, mask = private_strategy(trainer, self), self._mask
        assert mask is not None
        steps, (last, known) = strategy.steps_taken, self._seen
        if steps <= last:
            return  # within an accumulation: the mask has had no step yet
        version = mask.version(steps - 1)
        self._seen = (steps, version)
        if version == known:
            return
        values = {
            "privacy/sparsification_rate": mask.realized_rate,
            "communication/bytes_per_step": float(strategy.bytes_per_step),
        }
        for name, value in values.items():
            pl_module.log(name, value, logger=False, batch_size=1)
        write_to_loggers(trainer, values)
