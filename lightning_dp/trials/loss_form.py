"""The form of a loss: the operations of its graph. A form that no check has seen makes the checks due at once.

User code may turn to another loss after some steps (a curriculum), or begin to mix samples within the network. The
checks would find out, but only when they are due again. The graph of a loss shows its operations. Reading all of them
costs about a microsecond each, so it is read as a whole for a number of operations that was not seen before, and
otherwise next to the loss. The graph does not show statistics of the data without gradient. For these, the calls of
torch are watched now and then, which costs about 5 microseconds each.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from lightning_dp.per_sample.owners.telling import telling
from lightning_dp.sandbox.writes import When
from lightning_dp.trials.firsts import Shown
from lightning_dp.trials.loss_calls import Calls
from lightning_dp.trials.loss_factors import LossFactors

NEAR = 32
"""Nodes of the graph that are read if their number is known, nearest to the loss first."""

ALL = 20_000
"""Nodes of the graph that are read if their number is new."""

EVERY = 16
"""The calls of one in so many steps are watched, if nothing else asks for it."""

MOST = 8
"""New forms that are checked at once; later ones once in 100 steps, because data may choose among many forms."""

_OF_USERS = {"attribute", "content"}
"""First words of the keys of writes that only user code makes."""

_SOON = 2
"""Steps after which a write that comes back has not paused."""


class LossForm:
    """The pairs of successive operations in the graphs of the losses of a run.

    **Guarantee**: :attr:`is_new` is true from the first loss on that has a pair of successive operations, or an
    operation over dimensions, which no checked loss had, if the number of operations is new or the pair is next to the
    loss; else, and for calls of torch without gradient, from one of the next 16 losses on. A batch of a new size is
    watched at once. It is also true if the forward has registered another number of hooks, or if the factors by which a
    loss counts its rows are new (``LossFactors``). What it does NOT show: the same calls with other values that leave
    these factors as they are.

    Example:
        >>> import torch
        >>> x, form = torch.ones(3, requires_grad=True), LossForm()
        >>> form.see((x * 2).sum(), checked=True)
        >>> form.see((x * 3).sum(), checked=False)
        >>> form.is_new
        False
        >>> form.see((x * 2).sum().square(), checked=False)
        >>> form.is_new
        True
    """

    def __init__(self) -> None:
        self._checked: set[Any] = set()
        self._new: set[Any] = set()
        self._new_calls: set[Any] = set()
        self._numbers: set[int] = set()
        self._kinds: dict[Hashable, int] = {}
        self._calls: Calls | None = None
        self._num_new, self.factors, self.shown = 0, LossFactors(), Shown()
        self._written: dict[Any, tuple[int, int]] = {}  # by write: its last step, and its longest pause
        self.checked_at = -1
        """Logical step of the last checks that samples are independent."""

    def see(
        self, loss: Tensor, *, checked: bool, num_operations: int | None = None, count: int = 0, num_hooks: int = 0
    ) -> None:
        """Read the operations of a loss that a check looks at, or of a real one.

        Args:
            loss: before its backward.
            checked: whether a check looks at it.
            num_operations: number of differentiable operations since the forward began; None if not counted.
            count: number of records, whose factors are to be read in the backward; 0 for none.
            num_hooks: number of hooks registered since the forward began, each of which may change gradients.
        """
        if count:
            self.factors.watch(loss, count)
        if self._calls is not None:
            self._calls.listens = False  # what follows the first loss may be the engine's
        near = num_operations in self._numbers
        if num_operations is not None and len(self._numbers) < ALL:
            self._numbers.add(num_operations)
        pairs = _pairs_of(loss, NEAR if near else ALL)
        if num_hooks:  # a check may have run on a record for which they are registered, and compare zeros
            pairs.add(("hooks", num_hooks))
        if checked:
            self._checked |= pairs
        else:
            self._new |= pairs - self._checked

    def see_writes(self, keys: Iterable[Any], when: When, number: int) -> bool:
        """Take note of what user code has written, and when; tell whether some of it is new.

        So is a write after a pause that is longer than any before, by a factor of about 4: what counts wrote once, a
        rare record may write again.

        Args:
            keys: of the writes.
            when: it has written.
            number: of the logical step.
        """
        places = {("written", when, key) for key in keys}
        for place in places:
            last, longest = self._written.get(place, (number, 0))
            pause = (max(0, number - last - _SOON).bit_length() + 1) // 2
            self._written[place] = number, max(pause, longest)
            if pause > longest:
                self._checked.discard(place)
        new = places - self._checked
        self._new |= new
        return bool(new)

    def note_writes(self, keys: Iterable[Any]) -> None:
        """Count as checked what was written in a run whose state is compared: attributes at any time, the rest after
        a release, as optimizers write it.
        """
        for key in keys:
            for when in When if key[0] in _OF_USERS else (When.RELEASED,):
                self._checked.add(place := ("written", when, key))
                self._written.setdefault(place, (self.checked_at, 0))

    def see_spread(self, paths: Iterable[Any]) -> bool:
        """Read which values of a batch change with a record of others; tell whether one of them is new."""
        new = {("spread", path) for path in paths} - self._checked
        self._new_calls |= new
        return bool(new)

    def watching(
        self, kind: Hashable = None, *, always: bool = False, checked: bool = False
    ) -> AbstractContextManager[None]:
        """Watch calls of torch in user code until its first loss, for a new kind of batch and one in 16 of each kind.

        Args:
            kind: of the batch, such as its size.
            always: whether to watch in any case.
            checked: whether a check looks at it; it is watched in any case.
        """
        if not checked:
            self._kinds[kind] = number = self._kinds.get(kind, -1) + 1
            if not always and number % EVERY != 0:
                return nullcontext()
        return self._watching(checked)

    @contextmanager
    def _watching(self, checked: bool) -> Iterator[None]:
        before, self._calls = self._calls, Calls()
        calls = self._calls
        try:
            with telling(calls.hear):
                yield
        finally:
            self._calls = before
            if checked:
                self._checked |= calls.pairs
            else:
                self._new_calls |= calls.pairs - self._checked

    @property
    def is_new(self) -> bool:
        """True if a real loss had operations that no check has seen, or counted its rows by other factors, or if its
        batch has shown anything for the first time.
        """
        return self.num_new > 0 or self.factors.read_new()

    @property
    def num_new(self) -> int:
        """Number of things that :attr:`is_new` tells of, without factors, which show after the backward."""
        return len(self._new) + len(self._new_calls) + self.shown.num_new

    @property
    def has_new_calls(self) -> bool:
        """True if there are new calls of torch, which no graph shows."""
        return bool(self._new_calls)

    @property
    def has_new_operations(self) -> bool:
        """True if a real loss had operations, or its forward calls, that no check has seen."""
        return bool(self._new or self._new_calls)

    @property
    def has_written(self) -> bool:
        """True if user code has written something in a way that no check has seen."""
        return any(each[0] == "written" for each in self._new)

    @property
    def was_released(self) -> bool:
        """True if what is new was done after the forward of the step before."""
        return any(each[:2] == ("written", When.RELEASED) for each in self._new)

    def is_due(self, since: int, number: int = 0) -> bool:
        """Tell whether to check a new form, or new factors or values, now.

        Args:
            since: number of steps since the last check.
            number: of the logical step.
        """
        if self.factors.are_due(number) or self.shown.are_due(number):
            return True
        return self.has_new_operations and (self._num_new < MOST or since >= 100)

    def settle(self, *, by_check: bool) -> None:
        """Count the operations seen so far as checked.

        Args:
            by_check: whether this took a check of its own; else calls stay new that the regular check has not shown.
        """
        self._num_new += by_check
        self._checked |= self._new
        self._new = set()
        if by_check:
            self._checked |= self._new_calls
            self._new_calls = set()


class _Kinds(dict[type, tuple[str, tuple[str, ...]]]):
    """The name of each kind of operation, and its attributes that hold dimensions."""

    def __missing__(self, kind: type) -> tuple[str, tuple[str, ...]]:
        dimensions = [name for name in ("_saved_dim", "_saved_dim0", "_saved_dim1") if hasattr(kind, name)]
        self[kind] = found = kind.__name__, tuple(dimensions)
        return found


_KINDS = _Kinds()


def _pairs_of(loss: Tensor, most: int) -> set[Any]:
    """Return operations, nearest to the loss first, each with one that its result comes from, and with the dimensions
    over which it goes; nodes that only observe, and leaves, are left out.
    """
    pairs: set[Any] = set()
    nodes = [] if loss.grad_fn is None else [loss.grad_fn]
    known = set(nodes)
    for node in nodes:  # grows
        name, dimensions = _KINDS[type(node)]
        for dimension in dimensions:
            pairs.add((name, dimension, getattr(node, dimension)))
        before = [*node.next_functions]
        for other, _ in before:  # grows
            if other is None:
                continue
            kind, _ = _KINDS[type(other)]
            if kind == "_TapBackward":
                before += other.next_functions
            elif kind != "AccumulateGrad":
                pairs.add((name, kind))
                if other not in known and len(nodes) < most:
                    known.add(other)
                    nodes.append(other)
    return pairs
