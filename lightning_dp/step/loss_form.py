"""The form of a loss: its operations next to the end. A form that no check has seen makes the checks due at once.

User code may turn to another loss after some steps (a curriculum). The checks would find out that it mixes samples, but
only when they are due again. The operations of a loss are read from its graph, which costs some tens of microseconds.
"""

from __future__ import annotations

from torch import Tensor

NEAR = 64
"""Nodes of the graph that are read, nearest to the loss first."""

MOST = 8
"""New forms that are checked at once; later ones once in 100 steps, because data may choose among many forms."""


class LossForm:
    """The pairs of successive operations next to the end of the losses of a run.

    **Guarantee**: :attr:`is_new` is true from the first loss on that has a pair which no checked loss had. What it does
    NOT show: another computation outside of the graph, such as statistics of the data, and one with equal operations.

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
        self._checked: set[tuple[str, str]] = set()
        self._new: set[tuple[str, str]] = set()
        self._num_new = 0
        self.checked_at = -1
        """Logical step of the last checks that samples are independent."""

    def see(self, loss: Tensor, *, checked: bool) -> None:
        """Read the operations of a loss that a check looks at, or of a real one."""
        pairs = _pairs_of(loss)
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


def _pairs_of(loss: Tensor) -> set[tuple[str, str]]:
    """Return the names of operations next to the loss, each with one that its result comes from."""
    pairs: set[tuple[str, str]] = set()
    nodes = [] if loss.grad_fn is None else [loss.grad_fn]
    known = set(nodes)
    for node in nodes:  # grows
        name = type(node).__name__
        for before, _ in node.next_functions:
            if before is None:
                continue
            pairs.add((name, type(before).__name__))
            if before not in known and len(nodes) < NEAR:
                known.add(before)
                nodes.append(before)
    return pairs
