"""Private and non-private phases in one run, for study."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.callbacks._strategy import private_strategy
from lightning_dp.run_length import RunLength


class SwitchToDP(Callback):
    """A switch at an epoch from plain SGD to private training, or the reverse: for study only.

    A plain step has neither bound nor noise; the sum of raw gradients is divided by the expected batch size all the
    same.

    No guarantee: plain steps publish what they saw, and private steps after or before them do not take it back. The
    ledger holds them as what they are, so epsilon is infinite for the whole run.

    Args:
        at_epoch: the first epoch of the second phase, >= 0.
        reverse: private first, plain afterwards.

    Raises:
        ValueError: numbers out of range; ``target_epsilon`` with it; epochs of unknown length.
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
        """Hand the phases to the strategy when a stage begins, before its plan is built."""
        if stage == "fit":
            private_strategy(trainer, self).mechanisms.add(self, is_private=self._phases)

    def _phases(self, run: RunLength) -> Callable[[int], bool]:
        advice = "Give the dataset a length, or set `Trainer(limit_train_batches=...)`."
        first = self.at_epoch * run.epoch_steps("SwitchToDP", advice)
        return lambda step: (step >= first) != self.reverse
