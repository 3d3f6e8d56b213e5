"""The form of a loss: the operations of its graph. A form that no check has seen makes the checks due at once.

User code may turn to another loss after some steps (a curriculum), or begin to mix samples within the network. The
checks would find out, but only when they are due again. The graph of a loss shows its operations. Reading all of them
costs about a microsecond each, so it is read as a whole for a number of operations that was not seen before and for
each 16th loss, and otherwise next to the loss.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

NEAR = 32
"""Nodes of the graph that are read if their number is known, nearest to the loss first."""

ALL = 20_000
"""Nodes of the graph that are read if their number is new, and each 16th time."""

MOST = 8
"""New forms that are checked at once; later ones once in 100 steps, because data may choose among many forms."""


class LossForm:
    """The pairs of successive operations in the graphs of the losses of a run.

    **Guarantee**: :attr:`is_new` is true from the first loss on that has a pair of successive operations, or an
    operation over dimensions, which no checked loss had, if the number of operations is new or the pair is next to the
    loss; else from one of the next 16 losses on. What it does NOT show: another computation outside of the graph, such
    as statistics of the data without gradient, and one with equal operations.

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
        self._numbers: set[int] = set()
        self._num_new = self._num_seen = 0
        self.checked_at = -1
        """Logical step of the last checks that samples are independent."""

    def see(self, loss: Tensor, *, checked: bool, num_operations: int | None = None) -> None:
        """Read the operations of a loss that a check looks at, or of a real one.

        Args:
            loss: before its backward.
            checked: whether a check looks at it.
            num_operations: number of differentiable operations since the forward began; None if not counted.
        """
        self._num_seen += 1
        near = num_operations in self._numbers and self._num_seen % 16 != 0
        if num_operations is not None and len(self._numbers) < ALL:
            self._numbers.add(num_operations)
        pairs = _pairs_of(loss, NEAR if near else ALL)
        if checked:
            self._checked |= pairs
        else:
            self._new |= pairs - self._checked

    @property
    def is_new(self) -> bool:
        """True if a real loss had operations that no check has seen."""
        return bool(self._new)

    def is_due(self, since: int) -> bool:
        """Tell whether to check a new form now.

        Args:
            since: number of steps since the last check.
        """
        return self.is_new and (self._num_new < MOST or since >= 100)

    def settle(self, *, by_check: bool) -> None:
        """Count the operations seen so far as checked.

        Args:
            by_check: whether this took a check of its own.
        """
        self._num_new += by_check
        self._checked |= self._new
        self._new = set()


@functools.lru_cache(1024)
def _dimensions_of(kind: type) -> tuple[str, ...]:
    """Return the attributes of a kind of operation that hold dimensions."""
    return tuple(name for name in ("_saved_dim", "_saved_dim0", "_saved_dim1") if hasattr(kind, name))


def _pairs_of(loss: Tensor, most: int) -> set[Any]:
    """Return operations, nearest to the loss first, each with one that its result comes from, and with the dimensions
    over which it goes; nodes that only observe, and leaves, are left out.
    """
    pairs: set[Any] = set()
    nodes = [] if loss.grad_fn is None else [loss.grad_fn]
    known = set(nodes)
    for node in nodes:  # grows
        name = type(node).__name__
        for dimension in _dimensions_of(type(node)):
            pairs.add((name, dimension, getattr(node, dimension)))
        before = [before for before, _ in node.next_functions]
        for other in before:  # grows
            if other is None:
                continue
            kind = type(other).__name__
            if kind == "_TapBackward":
                before += [further for further, _ in other.next_functions]
            elif kind != "AccumulateGrad":
                pairs.add((name, kind))
                if other not in known and len(nodes) < most:
                    known.add(other)
                    nodes.append(other)
    return pairs
