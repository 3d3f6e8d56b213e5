"""Private and non-private phases in one run, for study only."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.callbacks._strategy import private_strategy
from lightning_dp.run_length import RunLength


class SwitchToDP(Callback):
    """A switch at an epoch from non-private to private training, or the reverse, for study only.

    A non-private step has neither clipping nor noise, but it also divides the sum by the expected batch size.

    No guarantee: non-private steps reveal their data, and private steps before or after do not undo that. The ledger
    records them as non-private, so epsilon is infinite for the whole run.

    Args:
        at_epoch: first epoch of the second phase, >= 0.
        reverse: True trains privately first, non-privately afterwards.

    Raises:
        ValueError: numbers out of range; a run with ``target_epsilon``; epochs of unknown length.
        TypeError: the Trainer's strategy is not a private one.

    Example:
        >>> callback = SwitchToDP(at_epoch=5)

    References:
        Watson et al. 2023, Inference and Interference, arXiv 2311.06839.
    """

    def __init__(self, at_epoch: int, *, reverse: bool = False) -> None:
        if isinstance(at_epoch, bool) or not isinstance(at_epoch, int) or at_epoch < 0:
            raise ValueError(f"Expected at_epoch to be a whole number >= 0, got at_epoch={at_epoch!r}. Count from 0.")
        self.at_epoch = at_epoch
        self.reverse = check.check_flag("reverse", reverse)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Pass the phases to the strategy when fit begins, before the plan is built."""
        if stage == "fit":
            private_strategy(trainer, self).mechanisms.add(self, is_private=self._phases)

    def _phases(self, run: RunLength) -> Callable[[int], bool]:
        advice = "Give the dataset a length, or set `Trainer(limit_train_batches=...)`."
        first = self.at_epoch * run.epoch_steps("SwitchToDP", advice)
        return lambda step: (step >= first) != self.reverse
