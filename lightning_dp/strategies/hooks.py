"""The user's hooks that see a batch, or results computed from it.

Those of the module run on trial as ``training_step`` does. Those of callbacks, and those that end an epoch, may write
files or lists of their own, so they run on trial only once they have changed the module outside of a trial, which is
watched.
"""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_dp.errors import PrivacyError
from lightning_dp.step.kept_tensors import same_values
from lightning_dp.step.local import local_part
from lightning_dp.step.snapshot import few_values, plain_attributes
from lightning_dp.strategies._lightning import is_overridden
from lightning_dp.system.torch_private import num_changes

if TYPE_CHECKING:
    from lightning_dp.strategies.base import PrivateStrategy

#: Packages whose callbacks are not the user's; they write no state from records into the module.
_KNOWN = ("lightning.", "pytorch_lightning.", "lightning_dp.")
#: Classes of Lightning whose hooks are the user's.
_OPEN = ("Callback", "LambdaCallback")
#: Called at the end of an epoch, in which values that were collected batch by batch may be written into the module.
EPOCH_END = "on_train_epoch_end"
#: Hooks that are watched.
_HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end", EPOCH_END)
_CONTAINERS = (MutableSequence, MutableMapping, MutableSet, deque)
_PLACES = 16  # values of a tensor that are compared, for what is written through ``.data``


class UserHooks:
    """The hooks of a module and of the user's own callbacks.

    **Guarantee**: what a hook writes into the module is checked as what ``training_step`` writes: of the module before
    the first step, of a callback when it first writes, before the next step or checkpoint. Not watched: callbacks of
    Lightning, of this package, and those that are derived from one of them. Not run on trial: hooks around an
    optimizer's step, which sees no gradient there.

    Args:
        strategy: of the Trainer.
    """

    def __init__(self, strategy: PrivateStrategy) -> None:
        self._strategy = strategy
        self._reported: set[str] = set()
        self._watched = [c for c in getattr(strategy.trainer, "callbacks", []) if not _is_known(type(c))]
        self._own: list[tuple[Any, str, Any]] = []  # instance attributes that the hooks replaced
        self.writing: list[Any] = []
        """Callbacks that have changed the module, and take part in trials since; the module, if the end of an epoch has
        changed it.
        """
        self.due = False
        """Whether one has begun to, and no check has run since."""

    @property
    def callbacks(self) -> list[pl.Callback]:
        """The callbacks that take part in trials; a trial must restore their state."""
        return [owner for owner in self.writing if owner is not self._strategy.module]

    def has(self, name: str) -> bool:
        """Tell whether the module, or a callback that takes part in trials, has a hook."""
        return any(True for _ in self._with(name))

    def call(self, name: str, *args: Any) -> list[Any]:
        """Call a hook on trial, in Lightning's order, and return the answers.

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
                        f"{problem} It changes the module, and this cannot be checked: leave it out."
                    ) from error
                if label not in self._reported:
                    self._reported.add(label)
                    warnings.warn(f"{problem} What it writes from a batch is not checked.", stacklevel=2)
        return answers

    def watch(self, is_on_trial: Callable[[], bool]) -> None:
        """Watch the hooks of callbacks; a callback that changes the module joins the trials, and a check becomes due.

        Args:
            is_on_trial: whether user code runs in the sandbox.
        """
        module = self._strategy.module
        for owner, names in (*((callback, _HOOKS) for callback in self._watched), (module, (EPOCH_END,))):
            for name in names:
                if _has(name, owner):
                    self._own.append((owner, name, vars(owner).get(name)))
                    owner.__dict__[name] = self._watching(getattr(owner, name), module, owner, is_on_trial)

    def unwatch(self) -> None:
        """Restore callbacks and module."""
        while self._own:
            owner, name, own = self._own.pop()
            if own is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = own

    def _watching(
        self, hook: Callable[..., Any], module: nn.Module, owner: Any, is_on_trial: Callable[[], bool]
    ) -> Callable[..., Any]:
        @functools.wraps(hook)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if owner in self.writing or is_on_trial():
                return hook(*args, **kwargs)
            before = _marks_of(module)
            answer = hook(*args, **kwargs)
            if not _are_same(before, _marks_of(module)):
                self.writing.append(owner)
                self.due = True
            return answer

        return watched

    def _with(self, name: str) -> Iterator[tuple[Any, Any]]:
        trainer, module = self._strategy.trainer, self._strategy.lightning_module
        for callback in self.callbacks:
            if _has(name, callback):
                yield callback, functools.partial(getattr(callback, name), trainer, module)
        if module is not None and is_overridden(name, module) and (name != EPOCH_END or module in self.writing):
            yield module, getattr(module, name)


def _marks_of(module: nn.Module) -> tuple[list[Any], Tensor]:
    """Return marks and a few values that quickly show whether a tensor or an attribute of a module has changed.

    The values are joined on one device, so that they are compared by one transfer.
    """
    tensors = [local_part(tensor) for tensor in (*module.parameters(), *module.buffers())]
    marks: list[Any] = [(num_changes(tensor), tensor.data_ptr()) for tensor in tensors]
    for part in module.modules():
        for name, value in plain_attributes(part).items():
            marks.append((name, id(value), len(value) if isinstance(value, _CONTAINERS) else 0))
    few = [few_values(tensor, _PLACES) for tensor in tensors]
    return marks, torch.cat([values.to(few[0].device) for values in few]) if few else torch.empty(0)


def _are_same(before: tuple[list[Any], Tensor], after: tuple[list[Any], Tensor]) -> bool:
    return before[0] == after[0] and same_values(before[1], after[1])


def outputs_of(output: Any) -> Any:
    """Return the value that Lightning passes to ``on_train_batch_end`` for an output of ``training_step``."""
    if output is None:
        return {}
    found = output if isinstance(output, Mapping) else {"loss": output}
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, dict(found))


def _has(name: str, owner: Any) -> bool:
    """Tell whether a callback or module has its own hook; a ``LambdaCallback`` has it as an instance attribute."""
    return name in vars(owner) or is_overridden(name, owner)


def _is_known(kind: type) -> bool:
    """Tell whether a class of callbacks is, or derives from, one of Lightning's or of this package's."""
    return any(base.__module__.startswith(_KNOWN) and base.__name__ not in _OPEN for base in kind.__mro__)
