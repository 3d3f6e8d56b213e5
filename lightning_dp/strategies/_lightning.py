"""Private API of Lightning that this package touches: one function each, so that a change of Lightning is mended here."""

from __future__ import annotations

import lightning.pytorch as pl


def logger_step(trainer: pl.Trainer) -> int:
    """Return the step under which Lightning's own callbacks write to loggers: batches that stepped, over all epochs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_saved_by_steps(trainer: pl.Trainer) -> bool:
    """Return whether ``ModelCheckpoint(every_n_train_steps=...)`` may write a checkpoint after this step."""
    intervals = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    return any(interval and trainer.global_step % interval == 0 for interval in intervals)
