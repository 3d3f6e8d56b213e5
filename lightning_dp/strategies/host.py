"""LightningHost: runs the user's step on records for a trial, and silences Lightning during it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_dp.sandbox.refilling import plain_of
from lightning_dp.sandbox.surroundings import Surroundings
from lightning_dp.sandbox.user_variables import UserVariables
from lightning_dp.step import checks
from lightning_dp.strategies import _lightning, _progress
from lightning_dp.strategies.counts import Counts
from lightning_dp.strategies.hooks import UserHooks, has_transfer, outputs_of
from lightning_dp.strategies.outcomes import forget_figures, kept_outcomes
from lightning_dp.strategies.silence import silent, silent_loggers
from lightning_dp.trials.host import Host

if TYPE_CHECKING:
    from lightning_dp.strategies.base import PrivateStrategy


class LightningHost(Host):
    """The user's ``training_step`` under a Lightning strategy, for the trials of the private step.

    Args:
        strategy: strategy that runs the step.
    """

    def __init__(self, strategy: PrivateStrategy) -> None:
        limit = strategy.settings.samples_at_once
        super().__init__(lambda: strategy.loader, strategy.to_device, world_size=strategy.world_size, limit=limit)
        self._strategy, trainer = strategy, strategy.trainer
        self.shows_progress = trainer.progress_bar_callback is not None and trainer.is_global_zero
        self.narrow = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        self.hooks = UserHooks(strategy, self.others, self._beyond)
        self._batch: Any = None
        self._idle: tuple[int, Any] = (0, None)  # number of records and batch, if none was drawn
        self._is_rehearsing = False  # then hooks have seen the batch before
        self._is_ending = False  # whether the run ends anyway, by a callback of Lightning's own
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        """Further arguments of the current ``training_step``."""
        self.clips = SimpleNamespace()  # arguments of the module's ``clip_gradients``, compared as rates are
        self._held: tuple[Any, list[Any]] | None = None  # arguments and public counters before the trial under way

    @override
    def saved(self) -> dict[str, Any]:
        return {**self.hooks.saved(), **self._surroundings.settings()}

    @override
    def others(self) -> list[Any]:
        configs = self._strategy.lr_scheduler_configs
        return [*self._strategy.optimizers, *(config.scheduler for config in configs), self.clips]

    def reachable(self) -> list[Any]:
        """Return the objects, in addition to the module, whose state is restored after a trial."""
        datamodule = self._strategy.trainer.datamodule  # type: ignore[attr-defined]
        counters = [] if datamodule is None else [Numbers(datamodule)]
        callbacks = [vars(callback) for callback in self.hooks.callbacks]
        return [*self.others(), *callbacks, *counters, *self._surroundings.restored]

    @functools.cached_property
    def _surroundings(self) -> Surroundings:
        strategy = self._strategy
        roots = [strategy.trainer, strategy.loader, *self.others()]
        variables = UserVariables.of_objects([strategy.module, *self.hooks.owners])
        return Surroundings(roots, strategy.module.parameters(), variables)

    @override
    def attributes(self) -> list[Any]:
        return [*map(vars, self.hooks.owners), *self._surroundings.watched]

    def _beyond(self) -> tuple[list[Any], set[str]]:
        """Return what callbacks may write beyond the module, and the words by which it is read; nothing before the data
        of training are set up.
        """
        is_early = self._strategy.trainer.sanity_checking
        return ([], set()) if is_early else (self._surroundings.watched, self._mentioned)

    @functools.cached_property
    def _mentioned(self) -> set[str]:
        """Words by which the module's steps, or the framework, read what callbacks may write."""
        return UserVariables.of_objects([self._strategy.module]).names.mentioned | self._surroundings.keys_of_settings

    @override
    def counters(self) -> Callable[[], AbstractContextManager[None]]:
        return functools.partial(self._counting, Counts(self._strategy), self.arguments)

    @contextmanager
    def _counting(self, counts: Counts, arguments: Any) -> Iterator[None]:
        before, self.arguments = self.arguments, arguments
        try:
            with counts.back_in():
                yield
        finally:
            self.arguments = before

    @override
    def advance(self) -> None:
        """Go on to the next batch of the epoch, or to its first one."""
        (rest, kwargs), index = self.arguments, self._batch_idx + 1
        index = index if index < self._strategy.trainer.num_training_batches else 0
        _progress.set_batch_idx(self._strategy.trainer, index)
        self.arguments = ((index, *rest[1:]) if rest and isinstance(rest[0], int) else rest), kwargs

    @override
    def stay(self) -> None:
        if self._held is not None:
            self.arguments, counters = self._held
            _progress.set_counters(self._strategy.trainer, counters)

    @override
    def run(self, records: list[Any]) -> Any:
        """Collate records and move them to the device, call the hooks that see the batch, and run ``training_step``."""
        rest, kwargs = self.arguments
        if not self._is_rehearsing:
            self.begin(records)
        return self._strategy.call_training_step(self._batch, rest, kwargs)

    @override
    def begin(self, records: list[Any]) -> None:
        self._batch = self.training.batch_of(records, on_trial=True)
        self._strategy.trainer.should_stop = self._is_ending
        self.skips = self._skips(self._batch)

    @override
    def backward(self, loss: Tensor) -> None:
        """Back-propagate the loss of a trial, with the hooks that free gradients before."""
        strategy = self._strategy
        if strategy.module.automatic_optimization:
            optimizers = _lightning.lightning_optimizers(strategy)[:1]
            self.hooks.call("on_before_zero_grad", *optimizers)
            self.hooks.call("optimizer_zero_grad", strategy.trainer.current_epoch, self._batch_idx, *optimizers)
        self.back_propagate(loss, self.hooks.call)

    def back_propagate(self, loss: Tensor, call: Callable[..., object]) -> None:
        """Back-propagate a loss in the sandbox, with the hooks that take part there.

        Args:
            loss: a scalar.
            call: calls hooks by name.
        """
        module = self._strategy.module
        call("on_before_backward", loss)
        with checks.reached(loss) if _lightning.is_overridden("backward", module) else nullcontext():
            module.backward(loss)
        call("on_after_backward")

    @override
    def rehearse(self, closure: Callable[[], Any]) -> None:
        """Step the one optimizer through the module's ``optimizer_step``, as Lightning does, and its schedulers."""
        strategy, module, trainer = self._strategy, self._strategy.module, self._strategy.trainer
        left = trainer.accumulate_grad_batches - self._batch_idx % trainer.accumulate_grad_batches
        last = min(self._batch_idx + left, trainer.num_training_batches) - 1  # of the logical batch, which steps
        for optimizer in _lightning.lightning_optimizers(strategy)[:1]:
            self._is_rehearsing = True
            try:
                module.optimizer_step(trainer.current_epoch, int(last), optimizer, closure)
            finally:
                self._is_rehearsing = False
            if last == self._batch_idx:
                _progress.count_step(trainer)
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

    @override
    def end_batch(self, output: Any) -> None:
        self.hooks.call("on_train_batch_end", outputs_of(output), self._batch, self._batch_idx)
        self._batch = None

    @property
    @override
    def has_transfer(self) -> bool:  # type: ignore[override]
        return has_transfer(self._strategy.trainer, self._strategy.module)

    @property
    @override
    def has_epoch_end(self) -> bool:
        return self.hooks.has_any_between_batches()

    @override
    def end_epoch(self) -> None:
        self.hooks.call_between_batches()

    @property
    @override
    def stops(self) -> bool:
        return bool(self._strategy.trainer.should_stop)

    @override
    def skips_on(self, record: Any) -> bool:
        return self._skips(self.training.batch_of([record]))

    def _skips(self, batch: Any) -> bool:
        answers = self.hooks.call("on_train_batch_start", batch, self._batch_idx)
        return any(isinstance(answer, int) and answer == -1 for answer in answers)

    @property
    def _batch_idx(self) -> int:
        return self._strategy.trainer.fit_loop.batch_idx

    @override
    def loss_of(self, output: Any, count: int) -> Tensor | None:
        return checks.scalar_loss(output, count, self._strategy.state.loss_reduction)

    def empty_batch(self, copies: int) -> Any:
        """Return the batch that hooks see if no sample was drawn: the user's structure with tensors of length 0."""
        batch = self.training.stand_in(copies)
        self._idle = copies, batch
        return tree_map(lambda leaf: leaf[:0] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)

    def idle_batch(self, copies: int) -> Any:
        """Return the records that run with weight 0 if no sample was drawn; hooks of transfers have seen them."""
        (known, batch), self._idle = self._idle, (0, None)
        return batch if known == copies else self.training.stand_in(copies)

    def settling(self, settle: Callable[[], None]) -> Callable[[], None]:
        """Return a function that settles the module and, within a trial, forgets figures and counts of its last run."""

        def settle_all() -> None:
            settle()
            forget_figures(self._strategy.trainer)
            self.stay()

        return settle_all

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep ``self.log`` and ``self.log_dict`` to the trial, with its optimizer steps, and stay in the epoch."""
        trainer, held = self._strategy.trainer, self._held
        self._is_ending = trainer.should_stop and not self.hooks.stopped
        self._held = self.arguments, _progress.counters(trainer)
        with ExitStack() as stack:
            stack.callback(setattr, self, "_held", held)
            stack.callback(self.stay)
            stack.enter_context(kept_outcomes(self._strategy.trainer))
            stack.enter_context(silent(self._strategy.module))
            stack.enter_context(silent_loggers(self._strategy.trainer))
            stack.enter_context(_progress.within_epoch(self._strategy.trainer))
            for optimizer in _lightning.lightning_optimizers(self._strategy):
                stack.enter_context(_progress.counting(optimizer, trainer))
            yield


class Numbers(MutableMapping[str, Any]):
    """A view of the numbers and words that an object holds as attributes; the rest of it is not followed.

    Args:
        owner: the object.
    """

    def __init__(self, owner: Any) -> None:
        # a function, because a snapshot would copy all that an attribute leads to
        self._held: Callable[[], dict[str, Any]] = lambda: vars(owner)

    @override
    def __getitem__(self, name: str) -> Any:
        return plain_of(self._held())[name]

    @override
    def __setitem__(self, name: str, value: Any) -> None:
        self._held()[name] = value

    @override
    def __delitem__(self, name: str) -> None:
        del self._held()[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(plain_of(self._held()))

    @override
    def __len__(self) -> int:
        return len(plain_of(self._held()))
