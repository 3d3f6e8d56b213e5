"""LightningHost: runs the user's step on records for a trial, and silences Lightning during it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_dp.step import checks
from lightning_dp.step.records import TrainingRecords
from lightning_dp.strategies import _lightning
from lightning_dp.strategies.hooks import UserHooks, outputs_of

if TYPE_CHECKING:
    from lightning_dp.strategies.base import PrivateStrategy


class LightningHost:
    """The user's ``training_step`` under a Lightning strategy, for the trials of the private step.

    Args:
        strategy: strategy that runs the step.
    """

    def __init__(self, strategy: PrivateStrategy) -> None:
        self._strategy = strategy
        self._held: TrainingRecords | None = None
        self.hooks = UserHooks(strategy, self.others)
        self._batch: Any = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        """Further arguments of the current ``training_step``."""

    @property
    def shows_progress(self) -> bool:
        """True if the Trainer shows a progress bar, on this rank."""
        return self._strategy.trainer.progress_bar_callback is not None and self._strategy.trainer.is_global_zero

    @property
    def narrow(self) -> torch.dtype:
        """Narrowest dtype of the step: bfloat16 under a bf16 precision of the Trainer, else float32."""
        return torch.bfloat16 if "bf16" in str(self._strategy.trainer.precision) else torch.float32

    @property
    def _records(self) -> TrainingRecords:
        """Records of the training set; the loader may be replaced during a fit."""
        if self._held is None or self._held.loader is not self._strategy.loader:
            before, self._held = self._held, TrainingRecords(self._strategy.loader, self._strategy.to_device)
            if before is not None:
                self._held.axes, self._held.labels = before.axes, before.labels
        return self._held

    @property
    def axes(self) -> tuple[str, ...]:
        """Paths of the tensors of a batch that have one row per record."""
        return self._records.axes

    @property
    def batch_size(self) -> int:
        """Expected number of records in a real microbatch, at most the dataset size."""
        return self._records.batch_size(self._strategy.world_size, self._strategy.settings.samples_at_once)

    def saved(self) -> dict[str, Any]:
        """Return copies of what user code puts into a checkpoint, by its path."""
        return self.hooks.saved()

    def others(self) -> list[Any]:
        """Return the optimizers and schedulers."""
        return [*self._strategy.optimizers, *(config.scheduler for config in self._strategy.lr_scheduler_configs)]

    def reachable(self) -> list[Any]:
        """Return the objects, in addition to the module, whose state is restored after a trial."""
        return [*self.others(), *(vars(callback) for callback in self.hooks.callbacks)]

    def records(self, num: int, seed: int = 0) -> list[Any]:
        """Return records from all over a dataset with random access; for a stream, the first ones."""
        return self._records.take(num, seed)

    def check_reading(self, seed: int) -> None:
        """Check that an item of the dataset is the same whatever else is read."""
        self._records.check_reading(seed)

    def check_order(self) -> None:
        """Check, at the beginning of a pass, that the records are where they were."""
        self._records.check_order()

    def run(self, records: list[Any]) -> Any:
        """Collate records and move them to the device, call the hooks that see the batch, and run ``training_step``."""
        rest, kwargs = self.arguments
        self._batch = self.batch_of(records)
        self._strategy.trainer.should_stop = False
        self.skips = self._skips(self._batch)
        return self._strategy.call_training_step(self._batch, rest, kwargs)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a loss, with the hooks before and after it."""
        strategy = self._strategy
        if strategy.module.automatic_optimization:
            optimizers = _lightning.lightning_optimizers(strategy)[:1]
            self.hooks.call("on_before_zero_grad", *optimizers)
            self.hooks.call("optimizer_zero_grad", strategy.trainer.current_epoch, self._batch_idx, *optimizers)
        self.hooks.call("on_before_backward", loss)
        with checks.reached(loss):
            strategy.module.backward(loss)
        self.hooks.call("on_after_backward")

    def rehearse(self, closure: Callable[[], Any]) -> None:
        """Step the one optimizer through the module's ``optimizer_step``, as Lightning does, and its schedulers."""
        strategy, module = self._strategy, self._strategy.module
        for optimizer in _lightning.lightning_optimizers(strategy)[:1]:
            module.optimizer_step(strategy.trainer.current_epoch, self._batch_idx, optimizer, closure)
        for config in strategy.lr_scheduler_configs:
            if not config.reduce_on_plateau:
                with suppress(Exception):  # it may be at its end
                    module.lr_scheduler_step(config.scheduler, None)

    @contextmanager
    def own_callbacks(self) -> Iterator[None]:
        """Let Lightning call only those callbacks that take part in trials, and progress bars, whose threads look for
        themselves in the list.
        """
        trainer: Any = self._strategy.trainer
        before = trainer.callbacks
        trainer.callbacks = [one for one in before if one in self.hooks.callbacks or isinstance(one, ProgressBar)]
        try:
            yield
        finally:
            trainer.callbacks = before

    def end_batch(self, output: Any) -> None:
        """Call the hooks that end a batch."""
        self.hooks.call("on_train_batch_end", outputs_of(output), self._batch, self._batch_idx)
        self._batch = None

    @property
    def has_epoch_end(self) -> bool:
        """True if trials also run user hooks outside of batches, such as those between two epochs."""
        return self.hooks.has_any_between_batches()

    def end_epoch(self) -> None:
        """Call the hooks that end an epoch and begin the next."""
        self.hooks.call_between_batches()

    @property
    def stops(self) -> bool:
        """True if user code has asked for the end of the run."""
        return bool(self._strategy.trainer.should_stop)

    def skips_on(self, record: Any) -> bool:
        """Tell whether the hooks that begin a batch, given one record alone, ask to skip the rest of the epoch."""
        return self._skips(self.batch_of([record]))

    def _skips(self, batch: Any) -> bool:
        answers = self.hooks.call("on_train_batch_start", batch, self._batch_idx)
        return any(isinstance(answer, int) and answer == -1 for answer in answers)

    @property
    def _batch_idx(self) -> int:
        return self._strategy.trainer.fit_loop.batch_idx

    def learn_rows(self) -> None:
        """Find the tensors of a collated batch that have one row per record."""
        self._records.learn_rows(self._strategy.root_device)

    def loss_of(self, output: Any, count: int) -> Tensor | None:
        """Return the loss of an output as a scalar; None if the output is None."""
        return checks.scalar_loss(output, count, self._strategy.settings.loss_reduction)

    def stand_in(self, copies: int = 1) -> Any:
        """Return a batch on the device that replaces an empty one: one record, or copies of it."""
        return self._records.stand_in(copies)

    def empty_batch(self) -> Any:
        """Return the batch that hooks see if no sample was drawn: the user's structure with tensors of length 0."""
        return tree_map(lambda leaf: leaf[:0] if isinstance(leaf, Tensor) and leaf.dim() else leaf, self.stand_in())

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep ``self.log`` and ``self.log_dict`` to the trial, and switch off the count of optimizer steps."""
        with ExitStack() as stack:
            stack.enter_context(_lightning.kept_figures(self._strategy.trainer))
            stack.enter_context(silent(self._strategy.module))
            for optimizer in _lightning.lightning_optimizers(self._strategy):
                stack.enter_context(_lightning.without_progress(optimizer))
            yield

    def batch_of(self, records: list[Any]) -> Any:
        """Return a batch of records, collated and moved to the device as Lightning does it."""
        return self._records.batch_of(records)


@contextmanager
def silent(module: pl.LightningModule) -> Iterator[None]:
    """Let ``self.log`` and ``self.log_dict`` show their figures to nobody but user code that reads them back."""

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, (int, float, Tensor)):
            figure = torch.as_tensor(value).detach()
            for store in _lightning.figures(module.trainer):
                store |= dict.fromkeys((name, f"{name}_step", f"{name}_epoch"), figure)

    def log_dict(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            log(name, value)

    replaced = {"log": log, "log_dict": log_dict}
    before = {name: module.__dict__[name] for name in replaced if name in module.__dict__}
    module.__dict__.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


class Counts:
    """Public counters that may decide when an optimizer steps: the Trainer's count, and numbers that the module keeps.

    Args:
        strategy: runs the step.
    """

    def __init__(self, strategy: PrivateStrategy) -> None:
        self._strategy = strategy
        self._global_step = strategy.trainer.global_step
        self._after: int | None = None
        self._attributes = _plain(strategy.module.__dict__)

    @classmethod
    def of_batch(cls, strategy: PrivateStrategy, before: Counts | None, *, stopped: bool) -> Counts:
        """Return the counters before a batch, or those before the one in which user code has asked for the end."""
        if before is None or not stopped:
            return cls(strategy)
        before.end()
        return before

    def end(self) -> None:
        """Take note of the Trainer's count at the end of the batch, once."""
        if self._after is None:
            self._after = self._strategy.trainer.global_step

    @contextmanager
    def back_in(self, *, after: bool = False) -> Iterator[None]:
        """Set the counters to their values at creation; afterwards restore the Trainer's count, not the module's
        numbers.

        Args:
            after: whether the Trainer's count is that of ``end``, which the last hooks of the batch have seen.
        """
        progress = _lightning.completed_steps(self._strategy.trainer)
        completed = progress.completed
        progress.completed = self._after if after and self._after is not None else self._global_step
        own = self._strategy.module.__dict__
        for name in _plain(own).keys() - self._attributes.keys():
            del own[name]
        own.update(self._attributes)
        try:
            yield
        finally:
            progress.completed = completed


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, (bool, int, float, str))}
