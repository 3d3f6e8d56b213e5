"""The factors of a loss: by how much it counts each entry of its sums and means.

The loss of a batch is a sum or mean over rows, and some arithmetic on scalars. If this arithmetic follows the records
(a batch that is skipped, clamped or weighted, a count of valid entries), one record changes the gradient of all. The
operations may be the same whatever the records are, but the factor of a row is another one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_dp.system.torch_private import divisor_of, size_of_result

MOST = 256
"""Nodes of the graph that are read, nearest to the loss first."""

MOST_AT_ONCE = 16
"""Checks of new factors at once; later ones once in 100 steps, because public counts may choose among many."""

_DIGITS = {torch.bfloat16: 2, torch.float16: 2}
"""Digits of a factor that are compared, by type; 5 of all others."""


class LossFactors:
    """The derivative of losses with respect to each entry of the tensors that they sum or average.

    A factor is known if it, or it times the number of records, is one that was checked. Which of the two stays the
    same shows in the first batch of another size, which is new once more.

    **Guarantee**: of the first ``MOST`` operations on scalars, all reductions are read. What it does NOT show: weights
    of rows that follow other rows, and gradients that a hook changes.

    Example:
        >>> def is_new(loss_of, *sizes):
        ...     factors = LossFactors()
        ...     for size in sizes:
        ...         loss = loss_of(torch.ones(size, requires_grad=True) * 2)
        ...         factors.watch(loss, size)
        ...         loss.backward()
        ...         yield factors.read_new()
        ...         factors.settle(0)
        >>> [*is_new(lambda rows: rows.mean() * 3, 4, 5, 4, 6)]
        [True, True, False, False]
        >>> [*is_new(lambda rows: rows[:4].mean(), 5, 6, 5, 4)]
        [True, True, False, False]
    """

    def __init__(self) -> None:
        self._found: list[tuple[str, Tensor, Any, int]] = []
        self._new: set[tuple[str, str, str]] = set()
        self._num_checked = self._checked_at = 0
        self._known: dict[str, set[tuple[str | None, str | None]]] = {}  # by reduction; None for one that changes

    def watch(self, loss: Tensor, count: int) -> None:
        """Read the factors in the backward of a loss, which begins after this.

        Args:
            loss: of a batch.
            count: number of records in it.
        """
        found = [*_reductions_of(loss)]
        if not found:  # a constant
            self._found.append(("", loss.detach().new_zeros(1), 1, count))
        for node, divisor in found:
            node.register_prehook(functools.partial(self._note, type(node).__name__, divisor, count))

    def _note(self, name: str, divisor: Any, count: int, gradients: Any) -> None:
        if gradients[0] is not None:
            self._found.append((name, gradients[0].detach(), divisor, count))

    def read_new(self) -> bool:
        """Read what the backwards since the last call have left; tell whether factors are new since ``settle``."""
        found, self._found = self._found, []
        for name, gradient, divisor, count in found:
            factor = float(gradient.reshape(-1)[0]) / (float(divisor) or math.nan)
            digits = _DIGITS.get(gradient.dtype, 5)
            one, of_record = f"{factor:.{digits}g}", f"{factor * count:.{digits}g}"
            known = self._known.get(name, set())
            if known.isdisjoint({(one, of_record), (one, None), (None, of_record)}):
                self._new.add((name, one, of_record))
        return bool(self._new)

    @property
    def num_new(self) -> int:
        """Number of factors that are new since ``settle``, as far as they have been read."""
        return len(self._new)

    def are_due(self, number: int) -> bool:
        """Tell whether to check new factors in a logical step: the first ones at once, later ones once in 100 steps."""
        return self.read_new() and (self._num_checked < MOST_AT_ONCE or number - self._checked_at >= 100)

    def settle(self, number: int, *, checked: bool = True) -> None:
        """Forget that factors are new, and take them for known ones if they were checked in a logical step."""
        if self.read_new() and checked:
            self._num_checked, self._checked_at = self._num_checked + 1, number
        for name, one, of_record in self._new if checked else ():
            known = self._known.setdefault(name, set())
            alike = {(ours, theirs) for ours, theirs in known if None not in (ours, theirs)}
            stays: set[tuple[str | None, str | None]] = {(one, None) for ours, _ in alike if ours == one}
            stays |= {(None, of_record) for _, theirs in alike if theirs == of_record}
            known |= stays or {(one, of_record)}
        self._new = set()


def _reductions_of(loss: Tensor) -> Iterator[tuple[Any, Any]]:
    """Yield the operations between a loss and the first tensors of several entries, each with the number of entries, or
    the sum of weights, by which it divides.
    """
    nodes = [loss.grad_fn] if loss.grad_fn is not None and loss.numel() == 1 else []
    known = {*nodes}
    for node in nodes:  # grows
        sizes = [(other, size_of_result(other, number)) for other, number in node.next_functions if other is not None]
        size = max((size for _, size in sizes), default=1)
        if size > 1:
            yield node, divisor_of(node, size)
        for other, each in sizes:
            if each == 1 and other not in known and len(nodes) < MOST:
                known.add(other)
                nodes.append(other)
