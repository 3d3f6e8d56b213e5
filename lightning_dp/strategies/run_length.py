"""The planned RunLength of a fit, computed from a Trainer's limits."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from lightning_dp.run_length import RunLength
from lightning_dp.sampling import SamplingFacts
from lightning_dp.strategies import _lightning
from lightning_dp.strategies.trainer_checks import accumulation


def run_length(trainer: pl.Trainer, facts: SamplingFacts, *, start: int) -> RunLength:
    """Return the planned length of a run."""
    remaining = remaining_steps(trainer, facts.accumulate)
    return RunLength(
        steps=None if remaining is None else start + remaining,
        steps_per_epoch=_steps_per_pass(trainer, facts),
        epochs_differ=len({*accumulation(trainer).values()}) > 1,
    )


def remaining_steps(trainer: pl.Trainer, parts: int) -> int | None:
    """Return an upper bound on the remaining logical steps; None if nothing bounds them."""
    fit_loop: Any = trainer.fit_loop
    bounds: list[int] = []
    if fit_loop.max_epochs is not None and fit_loop.max_epochs >= 0 and math.isfinite(fit_loop.max_batches):
        epochs, batches = fit_loop.epoch_progress.current, fit_loop.epoch_loop.batch_progress.current
        done = batches.processed // parts if epochs.ready > epochs.processed else 0
        per_epoch = math.ceil(fit_loop.max_batches / parts)
        bounds.append(max(0, fit_loop.max_epochs - epochs.processed) * per_epoch - min(done, per_epoch))
    if fit_loop.max_steps >= 0:
        bounds.append(fit_loop.max_steps - trainer.global_step)
    if not bounds:
        return None
    if _lightning.is_searching_learning_rate(trainer):
        # the search runs first and the run it prepares follows: both must fit under one target
        return max(0, bounds[-1]) + (max(0, bounds[0]) if len(bounds) > 1 else 0)
    return max(0, min(bounds))


def _steps_per_pass(trainer: pl.Trainer, facts: SamplingFacts) -> int | None:
    """Return the number of logical steps until the loader restarts; ``limit_train_batches`` may shorten a pass."""
    batches = trainer.fit_loop.max_batches
    limit = math.ceil(batches / facts.accumulate) if math.isfinite(batches) else None
    known = [steps for steps in (facts.steps_per_epoch, limit) if steps is not None]
    return min(known) if known else None
