"""The user's hooks that see a batch, or results computed from it.

Those of the module run on trial as ``training_step`` does. Those of callbacks, and those around an epoch, may write
files or lists of their own, so they run on trial only once they have changed the module, a learning rate or what a
checkpoint holds of them outside of a trial, which is watched.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_dp.errors import PrivacyError
from lightning_dp.sandbox.close_looks import CloseLook, Eye
from lightning_dp.sandbox.readings import Readings
from lightning_dp.sandbox.saved_state import leaves_of
from lightning_dp.strategies import _lightning, _progress
from lightning_dp.strategies.given import left_as_given
from lightning_dp.strategies.outcomes import ends_of
from lightning_dp.strategies.overrides import Overrides
from lightning_dp.system.local import address_of

if TYPE_CHECKING:
    from lightning_dp.strategies.base import PrivateStrategy

#: Called between two epochs, where values that were collected batch by batch may be written into the module.
BETWEEN_EPOCHS = ("on_train_epoch_end", "on_train_epoch_start")
#: Hooks that see a batch, or what was computed from it.
_OF_BATCHES = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip
#: Hooks that see no batch; each is tried only once it has itself changed parameters or buffers.
_FAR = (
    "on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_end", "on_train_end",
)  # fmt: skip
_BEFORE_BACKWARD = ("on_train_batch_start", "on_before_backward")
"""Those that are given a batch or loss whose gradients count."""
_OF_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class UserHooks:
    """The hooks of a module and of the user's own callbacks.

    **Guarantee**: what a hook writes into the module, or where the module's steps would read it, is checked as what
    ``training_step`` writes: of the module before the first step, of a callback when it first writes, before the next
    step or checkpoint. Hooks around an optimizer's step see a gradient there that does not depend on the records. Not
    watched: hooks of Lightning's own callbacks and of this package's, and those between epochs of searches, whose steps
    are in the ledger.

    Args:
        strategy: of the Trainer.
        others: returns optimizers and schedulers.
        further: returns attributes of further objects, and variables, with the words that the module's steps mention.
    """

    def __init__(
        self,
        strategy: PrivateStrategy,
        others: Callable[[], list[Any]],
        further: Callable[[], tuple[list[Any], Set[str]]],
    ) -> None:
        self._strategy, self._others, self._further = strategy, others, further
        self._eye = Eye(strategy.module)
        self._reported: set[str] = set()
        self._watched = [*getattr(strategy.trainer, "callbacks", [])]
        self._overrides = Overrides()
        self.writing: list[Any] = []
        """Callbacks that have changed the module and therefore take part in trials; also the module, if its hook at the
        end of an epoch has changed it.
        """
        self._far: list[tuple[Any, str]] = []  # hooks of ``_FAR`` that have changed the module
        self._has_begun, self._added_in = False, -1  # epoch in which a hook has added groups to an optimizer
        self._before: dict[str, Any] | None = None
        self.readings = Readings()
        """What a hook of the module has read of the batch before its step."""
        self.stopped = False
        """Whether user code has asked for the end of the run."""

    @functools.cached_property
    def owners(self) -> list[pl.Callback]:
        """The callbacks with hooks of the user's own."""
        names = (*_OF_BATCHES, *BETWEEN_EPOCHS, *_FAR)
        return [owner for owner in self._watched if any(_lightning.is_overridden(name, owner) for name in names)]

    @property
    def callbacks(self) -> list[pl.Callback]:
        """The callbacks that take part in trials; a trial must restore their state."""
        return [owner for owner in self.writing if owner is not self._strategy.module]

    def take_before(self) -> dict[str, Any] | None:
        """Return, once, the state before a hook wrote, if one has begun to write since the last call; and what leads on
        from there to the first batch: the hook itself if it begins an epoch, else None; see ``Written.check``.
        """
        before, self._before = self._before, None
        return before

    def has_any_between_batches(self) -> bool:
        """Tell whether hooks between epochs, or far from batches, take part in trials."""
        return bool(self._far) or any(True for name in BETWEEN_EPOCHS for _ in self._with(name))

    def call_between_batches(self) -> None:
        """Call these hooks on trial, in the order of an epoch."""
        for name in (BETWEEN_EPOCHS[0], *_FAR):
            self.call(name)
        try:
            self.call(BETWEEN_EPOCHS[1])
        except PrivacyError as error:
            trainer = self._strategy.trainer
            if error.__cause__ is None or self._has_begun or self._added_in != trainer.current_epoch:
                raise  # else it cannot add its groups twice; the call that did so is checked from the state before
            with _progress.next_epoch(trainer) as is_left:
                if is_left:
                    self.call(BETWEEN_EPOCHS[1])

    def _num_groups(self) -> int:
        return sum(len(each.param_groups) for each in self._strategy.optimizers)

    @contextmanager
    def _begin_epoch(self) -> Iterator[None]:
        self.call(BETWEEN_EPOCHS[1])
        self._has_begun = True  # a check of this very call: one of another epoch would not do
        try:
            yield
        finally:
            self._has_begun = False

    def call(self, name: str, *args: Any) -> list[Any]:
        """Call a hook of callbacks and module on trial, in Lightning's order, and return their answers.

        Raises:
            PrivacyError: a callback that writes into the module cannot run on trial.
        """
        answers = []
        for owner, hook in self._with(name):
            label = f"{type(owner).__name__}.{name}"
            try:
                answers.append(hook(*args))
            except PrivacyError:
                raise
            except Exception as error:
                problem = f"Expected {label} to run on a few records alone, got {type(error).__name__}: {error}."
                if owner in self.writing:
                    raise PrivacyError(
                        f"{problem} It changes the module, and this cannot be checked: let it run on one record, "
                        "and more often than in training, or leave it out."
                    ) from error
                if label not in self._reported:
                    self._reported.add(label)
                    warnings.warn(f"{problem} What it writes from a batch is not checked.", stacklevel=2)
        return answers

    def run(self, name: str, *args: Any) -> None:
        """Call the same hooks in a microbatch; an error is raised as in training."""
        for _, hook in self._with(name):
            hook(*args)

    def saved(self) -> dict[str, Any]:
        """Return copies of what the user's hooks put into a checkpoint, by its path: those of the module, the data
        module, and callbacks that take part in trials.
        """
        trainer, module = self._strategy.trainer, self._strategy.module
        own = {address_of(tensor) for tensor in (*module.parameters(), *module.buffers())}
        checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
        checkpoint |= {"epoch": trainer.current_epoch, "global_step": trainer.global_step, "callbacks": {}, "loops": {}}
        checkpoint |= {"optimizer_states": [], "lr_schedulers": []}
        self.call("on_save_checkpoint", checkpoint)
        for owner in (*self.callbacks, trainer.datamodule):  # type: ignore[attr-defined]
            if owner is not None and _lightning.is_overridden("state_dict", owner):
                with suppress(Exception):  # it raises in training too
                    checkpoint[f"{type(owner).__name__}.state_dict()"] = owner.state_dict()
        return {
            f"checkpoint[{name!r}]{path}": value.clone() if isinstance(value, Tensor) else value
            for name, held in checkpoint.items()
            for path, value in leaves_of(held)
            if not (name == "state_dict" and isinstance(value, Tensor) and address_of(value) in own)
        }

    def watch(self, is_on_trial: Callable[[], bool]) -> None:
        """Watch the hooks of callbacks; a callback that changes the module joins the trials, and a check becomes due.

        Args:
            is_on_trial: tells whether user code runs in the sandbox.
        """
        module = self._strategy.module
        for owner in (*self._watched, module):
            searches = _lightning.is_search(owner)
            for name in _OF_BATCHES if searches else (*_OF_BATCHES, *BETWEEN_EPOCHS, *_FAR):
                if _lightning.is_overridden(name, owner):
                    self._overrides.set(owner, name, self._watching(owner, name, is_on_trial))

    def unwatch(self) -> None:
        """Restore the hooks of callbacks and module."""
        self._overrides.undo()

    def _watching(self, owner: Any, name: str, is_on_trial: Callable[[], bool]) -> Callable[..., Any]:
        hook, module = getattr(owner, name), self._strategy.module
        saves = any(_lightning.is_overridden(saver, owner) for saver in ("state_dict", "on_save_checkpoint"))
        last: CloseLook | None = None

        def look() -> CloseLook:
            nonlocal last
            is_state = saves and owner is not module
            last = CloseLook(self._eye, self._others(), owner, self._further()[0], saves=is_state, last=last)
            return last

        @functools.wraps(hook)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if is_on_trial():
                return hook(*args, **kwargs)
            is_far, has_stopped, num_groups = name in _FAR, self.stopped, self._num_groups()
            takes_part, begins = self._takes_part(owner, name), self._begin_epoch if name == BETWEEN_EPOCHS[1] else None
            before = None if takes_part and begins is None else look()
            with self.watching_stops(owner, "" if is_far else name), self._watching_batch(owner, name, args, kwargs):
                answer = hook(*args, **kwargs)
            has_added = begins is not None and self._num_groups() != num_groups
            if has_added:
                self._added_in = self._strategy.trainer.current_epoch
            if (
                before is None
                or (takes_part and not has_added)
                or (self.stopped == has_stopped and before.is_same(look(), self._further()[1], tensors_only=is_far))
            ):
                return answer
            self._before = self._before or {"before": before, "begin": begins, "once": has_added}
            if is_far:
                self._far.append((owner, name))
            if owner not in self.writing and not (is_far and owner is module):
                self.writing.append(owner)
            return answer

        return watched

    def _watching_batch(self, owner: Any, name: str, args: Any, kwargs: Any) -> AbstractContextManager[object]:
        """Watch a hook that is given a real batch or loss: what the module's reads is noted, as in its step; that of a
        callback, which is not tried, may not change it.
        """
        if name not in _BEFORE_BACKWARD or not self._strategy.settings.check_per_sample:
            return nullcontext()
        if owner is not self._strategy.module:
            return left_as_given(f"{type(owner).__name__}.{name}", [*args[2:], *kwargs.values()])
        return nullcontext() if self._strategy.state.runs_alone else self.readings

    @contextmanager
    def watching_stops(self, owner: Any, name: str) -> Iterator[None]:
        """Take note if the user code within asks for the end of the run; the privacy statement says so.

        Args:
            owner: of the hook.
            name: of the hook; empty if it sees nothing of the training data.
        """
        trainer = self._strategy.trainer
        stopped, *ends = ends_of(trainer)
        yield
        stops, *others = ends_of(trainer)
        if name and others != ends and self._strategy.settings.check_per_sample:
            raise PrivacyError(
                f"Expected max_epochs and max_steps to stay while training, got a change by {type(owner).__name__}."
                f"{name}. The number of steps could depend on the data: set trainer.should_stop, which is checked, or "
                "set them before fit."
            )
        if stops and not stopped:
            self.stopped = True
            if name:
                self._strategy.state.choices.add(f"perhaps the end of the run, by {type(owner).__name__}.{name}")

    def _takes_part(self, owner: Any, name: str) -> bool:
        """Tell whether trials call a hook."""
        if name in _FAR:
            return (owner, name) in self._far
        return owner in self.writing or (owner is self._strategy.module and name not in BETWEEN_EPOCHS)

    def _with(self, name: str) -> Iterator[tuple[Any, Any]]:
        trainer, module = self._strategy.trainer, self._strategy.module
        for owner in (*self.callbacks, module):
            if _lightning.is_overridden(name, owner) and self._takes_part(owner, name):
                hook = getattr(owner, name)
                yield owner, hook if owner is module else functools.partial(hook, trainer, module)


def has_transfer(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Tell whether hooks of the user's take part in moving a batch to the device."""
    owners = (module, getattr(trainer, "datamodule", None))
    return any(_lightning.is_overridden(name, owner) for owner in owners if owner is not None for name in _OF_TRANSFER)


def outputs_of(output: Any) -> Any:
    """Return the value that Lightning passes to ``on_train_batch_end`` for an output of ``training_step``."""
    if output is None:
        return {}
    found = output if isinstance(output, Mapping) else {"loss": output}
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, dict(found))
