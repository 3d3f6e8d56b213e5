"""The factors of a loss: by how much it counts each entry of its sums and means.

The loss of a batch is a sum or mean over rows, and some arithmetic on scalars. If this arithmetic follows the records
(a batch that is skipped, clamped or weighted, a count of valid entries), one record changes the gradient of all. The
operations may be the same whatever the records are, but the factor of a row is another one.

Rows may also count by weights of their own, which need not follow their records alone (a mask of outliers, or of what
comes next to a rare record). Where all rows have had the same few weights for some steps, another one is new.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import number_in
from lightning_dp.system.torch_private import divisor_of, size_of_result

MOST = 256
"""Nodes of the graph that are read, nearest to the loss first."""

MOST_AT_ONCE = 16
"""Checks of new factors at once; later ones once in 100 steps, because public counts may choose among many."""

NEAR = 6
"""Operations at which the weights of rows are read, nearest to the loss first."""

_LOSS = "Loss"
"""Part of the names of reductions that weigh rows in their own way, so that user code does not."""

_MOST_ROWS = 2**14
"""Entries of a tensor up to which its weights are read."""

_QUIET = 2
"""Losses in a row whose weights are those of the loss before; other weights are new then."""

_RESTLESS = 8
"""Changes, of which none was new, after which weights are not read any more."""

_DIGITS = {torch.bfloat16: 2, torch.float16: 2}
"""Digits of a factor that are compared, by type; 5 of all others."""


class LossFactors:
    """The derivative of losses with respect to each entry of the tensors that they sum or average.

    A factor is known if it, or it times the number of records, is one that was checked. Which of the two stays the
    same shows in the first batch of another size, which is new once more.

    **Guarantee**: of the first ``MOST`` operations on scalars, all reductions are read. So are, at the ``NEAR``
    operations before sums and means, the least and the largest weight of the rows, where they have stayed the same for
    ``_QUIET`` losses. What it does NOT show: weights of rows that change all the time, or between these extremes, or
    farther from the loss, and gradients that a hook changes.

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
        >>> [*is_new(lambda rows: rows[:4].mean(), 5, 6, 5)]
        [True, True, False]
    """

    def __init__(self) -> None:
        self._found: list[tuple[str, Tensor, Any, int]] = []
        self._new: set[tuple[str, str, str]] = set()
        self._num_checked = self._checked_at = 0
        self._known: dict[str, set[tuple[str | None, str | None]]] = {}  # by reduction; None for one that changes
        self._rows: list[tuple[Hashable, Tensor, int]] = []
        self._weights: dict[Hashable, _Weights] = {}
        self.places: list[int] = []
        """Positions, within their batch, of records whose rows have got new weights since ``settle``."""

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
        sums = [node for node, _ in found if _LOSS not in type(node).__name__]
        for place, node in _before(sums):
            if not (place in self._weights and self._weights[place].are_restless):
                node.register_prehook(functools.partial(self._note_rows, place, count))

    def _note(self, name: str, divisor: Any, count: int, gradients: Any) -> None:
        if gradients[0] is not None:
            self._found.append((name, gradients[0].detach(), divisor, count))

    def _note_rows(self, place: Hashable, count: int, gradients: Any) -> None:
        gradient = gradients[0]
        if gradient is not None and 0 < gradient.numel() <= _MOST_ROWS and not gradient.is_complex():
            self._rows.append((place, gradient.detach(), count))

    def read_new(self) -> bool:
        """Read what the backwards since the last call have left; tell whether factors are new since ``settle``."""
        found, self._found = self._found, []
        for name, gradient, divisor, count in found:
            factor = number_in(gradient.reshape(-1)[0] if gradient.dim() else gradient) / (float(divisor) or math.nan)
            digits = _DIGITS.get(gradient.dtype, 5)
            one, of_record = f"{factor:.{digits}g}", f"{factor * count:.{digits}g}"
            known = self._known.get(name, set())
            if known.isdisjoint({(one, of_record), (one, None), (None, of_record)}):
                self._new.add((name, one, of_record))
        rows, self._rows = self._rows, []
        for place, gradient, count in rows:
            digits, extremes = _DIGITS.get(gradient.dtype, 5), torch.stack(gradient.aminmax()).tolist()
            weights, of_record = (str([f"{value * by:.{digits}g}" for value in extremes]) for by in (1, count))
            if self._weights.setdefault(place, _Weights()).see(weights, of_record):
                self._new.add((f"rows of {place}", weights, of_record))
                rows_of_one = max(1, gradient.numel() // count)
                self.places = [int(at) // rows_of_one for at in (gradient.argmin(), gradient.argmax())]
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
        self._new, self.places = set(), []


class _Weights:
    """The extreme weights of rows at one operation."""

    def __init__(self) -> None:
        self._last = "", ""
        self._known: set[str] = set()
        self._num_same = self._num_changes = 0

    @property
    def are_restless(self) -> bool:
        """True if they change all the time, so that nothing is new."""
        return self._num_changes >= _RESTLESS and not self._known

    def see(self, weights: str, of_record: str) -> bool:
        """Take note of the weights of a loss, and of their products with its number of records, of which either may be
        what stays the same; tell whether they have changed for the first time to these, after they were quiet.
        """
        same = [one == other for one, other in zip((weights, of_record), self._last, strict=True)]
        was_quiet, self._last = self._num_same >= _QUIET, (weights, of_record)
        if any(same):
            self._num_same += 1
            return False
        self._num_same, self._num_changes = 0, self._num_changes + 1
        is_new = was_quiet and self._known.isdisjoint((weights, of_record)) and len(self._known) < MOST_AT_ONCE
        if was_quiet:
            self._known |= {weights, of_record}
        return is_new


def _before(reductions: list[Any]) -> Iterator[tuple[Hashable, Any]]:
    """Yield the operations on rows that lead to reductions, nearest first, with the number and name of each."""
    nodes, known = [*reductions], {*reductions}
    for node in nodes:  # grows
        for other, number in node.next_functions:
            if other is not None and other not in known and size_of_result(other, number) > 1:
                known.add(other)
                nodes.append(other)
                if not hasattr(other, "variable"):  # a leaf
                    yield (len(nodes) - len(reductions), type(other).__name__), other
        if len(nodes) > NEAR + len(reductions):
            return


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
