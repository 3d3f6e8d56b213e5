"""Everything private of Lightning that this package touches: one function each, with a test of its own.

A new minor version of Lightning that moves one of these breaks one function and one test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core import saving
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher as MultiProcessingLauncher
from torch import nn

__all__ = [
    "MultiProcessingLauncher",
    "apply_transfer_hook",
    "completed_steps",
    "fit_results",
    "is_saved_by_steps",
    "is_searching_learning_rate",
    "launcher_of",
    "lightning_optimizers",
    "logger_step",
    "note_loaded_checkpoints",
    "replace_transfer_hook",
    "restore_transfer_hook",
    "set_batch_of_logs",
    "set_launcher",
    "start_equal",
    "start_method",
    "training_sources",
    "without_progress",
    "wrap_checkpoint_io",
]


def set_batch_of_logs(trainer: pl.Trainer, batch: Any, batch_size: int | None) -> None:
    """Set the batch whose size weights the means of ``self.log``."""
    results: Any = trainer._results
    results.batch, results.batch_size = batch, batch_size


def fit_results(trainer: pl.Trainer) -> Any:
    """Return the collection that figures pass on their way from ``self.log`` to loggers and progress bar."""
    return trainer.fit_loop.epoch_loop._results


def logger_step(trainer: pl.Trainer) -> int:
    """Return the step under which Lightning's own callbacks write to loggers: batches that stepped, over all epochs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_saved_by_steps(trainer: pl.Trainer) -> bool:
    """Return whether ``ModelCheckpoint(every_n_train_steps=...)`` may write a checkpoint after this step."""
    intervals = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    return any(interval and trainer.global_step % interval == 0 for interval in intervals)


def apply_transfer_hook(module: pl.LightningModule, batch: Any) -> Any:
    """Run the module's or datamodule's ``on_before_batch_transfer`` on a microbatch."""
    return type(module)._on_before_batch_transfer(module, batch, dataloader_idx=0)


def replace_transfer_hook(module: pl.LightningModule, passes: Callable[[Any], bool]) -> None:
    """Let batches pass Lightning's call of the transfer hook untouched if ``passes`` says so; see ``restore_transfer_hook``."""
    original = module._on_before_batch_transfer

    def on_before_batch_transfer(batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if passes(batch) else original(batch, dataloader_idx)

    module.__dict__["_on_before_batch_transfer"] = on_before_batch_transfer


def restore_transfer_hook(module: pl.LightningModule) -> None:
    """Undo ``replace_transfer_hook``."""
    module.__dict__.pop("_on_before_batch_transfer", None)


def lightning_optimizers(strategy: Any) -> list[Any]:
    """Return Lightning's wrappers of the optimizers, which manual optimization hands to the user."""
    wrappers: list[Any] = strategy._lightning_optimizers
    return wrappers


@contextmanager
def without_progress(optimizer: Any) -> Iterator[None]:
    """Keep the steps of a Lightning optimizer out of ``global_step``."""
    before = optimizer._on_before_step, optimizer._on_after_step
    optimizer._on_before_step = optimizer._on_after_step = _nothing
    try:
        yield
    finally:
        optimizer._on_before_step, optimizer._on_after_step = before


def completed_steps(trainer: pl.Trainer) -> Any:
    """Return the counter behind ``global_step`` under manual optimization; its ``completed`` may be set."""
    return trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total


def training_sources(trainer: pl.Trainer) -> tuple[Any, Any]:
    """Return the combined loader of the fit, if it is made, and what the user gave as training loaders."""
    fit_loop = trainer.fit_loop
    return fit_loop._combined_loader, fit_loop._data_source.instance


def is_searching_learning_rate(trainer: pl.Trainer) -> bool:
    """Tell whether a learning-rate search is under way."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any(type(callback).__name__ == "_LRCallback" for callback in callbacks)


def start_equal(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    _sync_module_states(module)


def launcher_of(strategy: Any) -> Any:
    """Return the launcher that a strategy has chosen."""
    return strategy._launcher


def set_launcher(strategy: Any, launcher: Any) -> None:
    """Give a strategy another launcher."""
    strategy._launcher = launcher


def start_method(launcher: Any) -> Any:
    """Return how a launcher starts processes: "spawn", "fork", ..."""
    return launcher._start_method


def wrap_checkpoint_io(held: Any, make: Callable[[], Any]) -> Any:
    """Return the checkpoint IO of a strategy: the user's, with an atomic writer inside where it takes one, else the writer."""
    if held is None:
        return make()
    if isinstance(held, _WrappingCheckpointIO):
        held.checkpoint_io = make()  # it takes none where the user gave it one
    return held


def note_loaded_checkpoints(note: Callable[[nn.Module, dict[str, Any]], None]) -> None:
    """Show every module that ``load_from_checkpoint`` makes, with its checkpoint, to ``note``; patches Lightning for good."""
    load = saving._load_state

    def watched(cls: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        made = load(cls, checkpoint, *args, **kwargs)
        if isinstance(made, nn.Module):
            note(made, checkpoint)
        return made

    saving._load_state = watched


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
