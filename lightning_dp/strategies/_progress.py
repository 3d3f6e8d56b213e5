"""Counters of Lightning's loops, which are private API of Lightning: one function each, with its own test."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl


def counters(trainer: pl.Trainer) -> list[Any]:
    """Return the numbers behind ``global_step``, ``current_epoch``, ``batch_idx`` and the like."""
    return [getattr(*each) for each in _counters(trainer)]


def set_counters(trainer: pl.Trainer, values: list[Any]) -> None:
    """Set the same numbers, or the first ones of them."""
    for (holder, name), value in zip(_counters(trainer), values, strict=False):
        setattr(holder, name, value)


def set_batch_idx(trainer: pl.Trainer, batch_idx: int) -> None:
    """Set ``batch_idx``, and what follows from it."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    progress.total.ready += batch_idx + 1 - progress.current.ready
    progress.current.ready, progress.is_last_batch = batch_idx + 1, batch_idx + 1 == trainer.num_training_batches


def count_step(trainer: pl.Trainer) -> None:
    """Count one more in ``global_step``."""
    _steps_of(trainer).completed += 1


@contextmanager
def counting(optimizer: Any, trainer: pl.Trainer) -> Iterator[None]:
    """Let steps of a Lightning optimizer, which user code takes itself, show in ``global_step`` and nowhere else."""
    before = optimizer._on_before_step, optimizer._on_after_step
    by_user = not trainer.lightning_module.automatic_optimization
    optimizer._on_before_step = _nothing
    optimizer._on_after_step = functools.partial(count_step, trainer) if by_user else _nothing
    try:
        yield
    finally:
        optimizer._on_before_step, optimizer._on_after_step = before


@contextmanager
def within_epoch(trainer: pl.Trainer) -> Iterator[None]:
    """Let ``current_epoch`` be that of the last epoch; once a fit has ended, Lightning counts one more."""
    progress = trainer.fit_loop.epoch_progress.current
    completed, progress.completed = progress.completed, min(progress.completed, max(progress.ready - 1, 0))
    try:
        yield
    finally:
        progress.completed = completed


@contextmanager
def next_epoch(trainer: pl.Trainer) -> Iterator[bool]:
    """Let ``current_epoch`` be that of the next epoch, and tell whether there is one."""
    progress, most = trainer.fit_loop.epoch_progress.current, trainer.max_epochs
    progress.completed += 1
    try:
        yield most is None or most == -1 or progress.completed < most
    finally:
        progress.completed -= 1


def _steps_of(trainer: pl.Trainer) -> Any:
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        return loop.automatic_optimization.optim_progress.optimizer.step.total
    return loop.manual_optimization.optim_step_progress.total


def _counters(trainer: pl.Trainer) -> list[tuple[Any, str]]:
    loop = trainer.fit_loop.epoch_loop
    epochs, batches = trainer.fit_loop.epoch_progress.current, loop.batch_progress
    further = [(loop, "_batches_that_stepped"), (batches.total, "ready"), (batches, "is_last_batch")]
    return [(_steps_of(trainer), "completed"), (epochs, "completed"), (batches.current, "ready"), *further]


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
