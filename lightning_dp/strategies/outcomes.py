"""Figures and ends of a run, which a trial leaves as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_dp.strategies import _lightning


@contextmanager
def kept_outcomes(trainer: pl.Trainer) -> Iterator[None]:
    """Give ``callback_metrics`` and the like the figures back that they held, and restore what ends the run."""
    loop, ends = trainer.fit_loop, ends_of(trainer)
    with _lightning.kept_figures(trainer, TrialFigures):
        try:
            yield
        finally:
            trainer.should_stop, loop.max_epochs, loop.epoch_loop.max_steps, loop.max_batches = ends


def forget_figures(trainer: pl.Trainer) -> None:
    """Give the figures back that were held before a trial, if one is under way."""
    for store in _lightning.figures(trainer):
        if isinstance(store, TrialFigures):
            store.forget()


def ends_of(trainer: pl.Trainer) -> tuple[Any, ...]:
    """Return what ends a run or an epoch: whether the Trainer should stop, most epochs, steps, and batches of one."""
    loop = trainer.fit_loop
    return trainer.should_stop, loop.max_epochs, loop.epoch_loop.max_steps, loop.max_batches


class TrialFigures(dict[str, Any]):
    """Figures of a trial: what it has logged itself stays when Lightning adds those of the last real batch."""

    def __init__(self, held: dict[str, Any]) -> None:
        super().__init__(held)
        self._held, self._own = held, dict[str, Any]()

    def forget(self) -> None:
        """Give up the figures of this trial."""
        self._own.clear()
        self.clear()
        super().update(self._held)

    def log(self, names: tuple[str, ...], figure: Tensor) -> None:
        """Hold a figure under several names."""
        self._own |= dict.fromkeys(names, figure)
        super().update(self._own)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take other figures, except under names of this trial's own."""
        super().update(*args, **kwargs)
        super().update(self._own)
