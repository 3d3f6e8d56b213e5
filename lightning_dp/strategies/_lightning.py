"""Every private API of Lightning that this package uses: one function each, with its own test.

A new minor version of Lightning that moves one of these breaks one function and one test.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric import wrappers
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.core import saving
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies.launchers import multiprocessing
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn

from lightning_dp.strategies.overrides import Overrides

MultiProcessingLauncher = multiprocessing._MultiProcessingLauncher
_OURS, _THEIRS = "lightning.pytorch", "pytorch_lightning"
#: Packages whose methods are not the user's; their hooks write no state from records into the module.
_KNOWN = ("lightning.", "pytorch_lightning.", "lightning_dp.", "builtins")
_NOTES: list[Callable[[nn.Module, dict[str, Any]], None]] = []


def twin(kind: type) -> type | None:
    """Return the ``pytorch_lightning`` counterpart of a ``lightning.pytorch`` class; None if that package is not in
    use.

    Both packages hold the same code in two class trees.
    """
    if "pytorch_lightning" not in sys.modules or not kind.__module__.startswith(_OURS):
        return None
    module = importlib.import_module(_THEIRS + kind.__module__.removeprefix(_OURS))
    return getattr(module, kind.__name__)  # type: ignore[no-any-return]


def is_a(thing: object, kind: type) -> bool:
    """Tell whether an object is an instance of a Lightning class, in either package."""
    other = twin(kind)
    return isinstance(thing, kind) or (other is not None and isinstance(thing, other))


def is_overridden(name: str, owner: object) -> bool:
    """Tell whether a module, data module or callback has a method of the user's; that of a ``LambdaCallback`` is an
    attribute of the instance.
    """
    kind: Any = type(owner)
    return name in vars(owner) or _is_of_user(name, kind, getattr(kind, name, None))


@functools.lru_cache(4096)
def _is_of_user(name: str, kind: Any, method: Any) -> bool:
    """Tell whether a class of the user's defines a method; the method itself is a key, as classes can be patched."""
    holder = next((each for each in kind.__mro__ if name in vars(each)), object)
    return not holder.__module__.startswith(_KNOWN)


def runs_backward(module: object, precision: object) -> bool:
    """Tell whether Lightning's own code back-propagates a loss, not that of a module or of a precision plugin."""
    return type(precision).__module__.startswith(_KNOWN) and not is_overridden("backward", module)


def serve_both(strategy: type = object) -> None:
    """Make Trainers of ``pytorch_lightning`` accept a strategy and this package's callbacks, if that package is in use.

    The strategy is registered with the abstract classes of that package. Callbacks get its ``Callback`` as a further
    base class.
    """
    for kind in strategy.__mro__:
        other: Any = twin(kind)
        if other is not None:
            other.register(strategy)
    other = twin(Callback)
    if other is None:
        return
    for callback in Callback.__subclasses__():
        if callback.__module__.startswith("lightning_dp.") and other not in callback.__mro__:
            callback.__bases__ = (*callback.__bases__, other)
    for note in _NOTES:
        _watch_loading(importlib.import_module(f"{_THEIRS}.core.saving"), note)


def set_batch_of_logs(trainer: pl.Trainer, batch: Any, batch_size: int | None) -> None:
    """Set the batch whose size is the weight of ``self.log`` in means."""
    results = fit_results(trainer)
    results.batch, results.batch_size = batch, batch_size


def fit_results(trainer: pl.Trainer) -> Any:
    """Return the collection that passes figures from ``self.log`` to loggers and progress bar."""
    return trainer.fit_loop.epoch_loop._results


_FIGURES = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def figures(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the mappings behind ``callback_metrics``, ``logged_metrics`` and ``progress_bar_metrics``."""
    return [getattr(trainer._logger_connector, name) for name in _FIGURES]


@contextmanager
def kept_figures(trainer: pl.Trainer, on_trial: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Replace the mappings of figures by those that ``on_trial`` makes, and restore them."""
    connector, before = trainer._logger_connector, figures(trainer)
    for name, held in zip(_FIGURES, before, strict=True):
        setattr(connector, name, on_trial(held))
    try:
        yield
    finally:
        for name, held in zip(_FIGURES, before, strict=True):
            setattr(connector, name, held)


def logger_step(trainer: pl.Trainer) -> int:
    """Return the step under which Lightning's callbacks log: batches that stepped, over all epochs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_saved_by_steps(trainer: pl.Trainer) -> bool:
    """Tell whether ``ModelCheckpoint(every_n_train_steps=...)`` may write a checkpoint after this step."""
    intervals = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    return any(interval and trainer.global_step % interval == 0 for interval in intervals)


def apply_transfer_hook(module: pl.LightningModule, batch: Any) -> Any:
    """Run the module's or datamodule's ``on_before_batch_transfer`` on a microbatch."""
    return type(module)._on_before_batch_transfer(module, batch, dataloader_idx=0)


def replace_transfer_hook(overrides: Overrides, module: pl.LightningModule, passes: Callable[[Any], bool]) -> None:
    """Skip Lightning's call of the transfer hook for batches that ``passes`` accepts, until overrides are undone."""
    original = module._on_before_batch_transfer

    def on_before_batch_transfer(batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if passes(batch) else original(batch, dataloader_idx)

    overrides.set(module, "_on_before_batch_transfer", on_before_batch_transfer)


def lightning_optimizers(strategy: Any) -> list[Any]:
    """Return Lightning's wrappers of the optimizers; manual optimization gives them to the user."""
    wrappers: list[Any] = strategy._lightning_optimizers
    return wrappers


def change_training_source(trainer: pl.Trainer, change: Callable[[Any, str], Any]) -> Callable[[], None]:
    """Pass training data through ``change`` before Lightning sees it; return a function that undoes this.

    Args:
        trainer: the Trainer whose fit is set up.
        change: (training data of the user, mode of its ``CombinedLoader``) -> training data for Lightning.
    """
    source = trainer.fit_loop._data_source
    original = source.dataloader

    def dataloader() -> Any:
        given = original()
        if is_a(given, CombinedLoader):
            return change(given.iterables, given._mode)
        return change(given, "max_size_cycle")

    overrides = Overrides()
    overrides.set(source, "dataloader", dataloader)
    return overrides.undo


def use_whole_loader(trainer: pl.Trainer) -> Callable[[], None]:
    """Let an epoch use the whole training loader; return a function that undoes this."""
    before, trainer.limit_train_batches = trainer.limit_train_batches, 1.0
    return lambda: setattr(trainer, "limit_train_batches", before)


def drop_loader_states(checkpoint: dict[str, Any]) -> None:
    """Remove the states of training loaders from a checkpoint that Lightning has built."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    loop.get("state_dict", {}).pop("combined_loader", None)


def is_search(callback: object) -> bool:
    """Tell whether a callback, of either package, searches a learning rate or batch size by training steps."""
    return is_a(callback, LearningRateFinder) or is_a(callback, BatchSizeFinder)


def is_fitting(module: pl.LightningModule | None) -> bool:
    """Tell whether a module is attached to a Trainer that fits it."""
    trainer = None if module is None else module._trainer
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def is_searching_learning_rate(trainer: pl.Trainer) -> bool:
    """Tell whether a learning-rate search is under way."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any(type(callback).__name__ == "_LRCallback" for callback in callbacks)


@contextmanager
def in_fabric_backward() -> Iterator[None]:
    """Allow backward passes of a Fabric model without ``fabric.backward`` within a block."""
    before, wrappers._in_fabric_backward = wrappers._in_fabric_backward, True
    try:
        yield
    finally:
        wrappers._in_fabric_backward = before


def launcher_of(strategy: Any) -> Any:
    """Return the launcher of a strategy."""
    return strategy._launcher


def set_launcher(strategy: Any, launcher: Any) -> None:
    """Replace the launcher of a strategy."""
    strategy._launcher = launcher


def start_method(launcher: Any) -> Any:
    """Return the process start method of a launcher: "spawn", "fork", ..."""
    return launcher._start_method


def wrap_checkpoint_io(held: Any, make: Callable[[], Any]) -> Any:
    """Return an atomic writer, or the user's checkpoint IO, which wraps the writer if it can wrap one."""
    if held is None:
        return make()
    if is_a(held, _WrappingCheckpointIO):
        held.checkpoint_io = make()  # ignored if the user has already set one
    return held


def note_loaded_checkpoints(note: Callable[[nn.Module, dict[str, Any]], None]) -> None:
    """Call ``note`` with each module that ``load_from_checkpoint`` loads, and its checkpoint; patch Lightning
    permanently.
    """
    _NOTES.append(note)
    _watch_loading(saving, note)
    serve_both()


def _watch_loading(package: Any, note: Callable[[nn.Module, dict[str, Any]], None]) -> None:
    load = package._load_state
    if hasattr(load, "notes"):
        if note not in load.notes:
            load.notes.append(note)
        return

    def watched(cls: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        made = load(cls, checkpoint, *args, **kwargs)
        if isinstance(made, nn.Module):
            for each in watched.notes:  # type: ignore[attr-defined]
                each(made, checkpoint)
        return made

    watched.notes = [note]  # type: ignore[attr-defined]
    package._load_state = watched
