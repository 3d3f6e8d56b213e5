"""Sums over the rows of each record: rows that belong to records by their position, or by an index.

Legend: ``B`` records, ``R`` rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import is_view, memory_of, unfollowed
from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.owners.loss_kinds import EXTREMES
from lightning_dp.per_sample.owners.owned import Rows
from lightning_dp.per_sample.tracking.nodes import is_tracked


class Places:
    """The record of each of R rows, of B records.

    Args:
        size: B.
        num: R.
        index: the record of each row, shape (R,); None if each record has R / B rows, in the order of the records.
        follower: follows the owners of rows, if there is an index.
    """

    def __init__(self, size: int, num: int, index: Tensor | None = None, follower: Follower | None = None) -> None:
        self._size, self.num, self.index, self._follower = size, num, index, follower

    def are_those_of(self, other: Places | None) -> bool:
        """Tell whether other rows are as many and belong to the same records."""
        if other is None or self.num != other.num:
            return False
        mine, others = self.index, other.index
        return mine is others or (mine is not None and others is not None and torch.equal(mine, others))

    @property
    def counts(self) -> Any:
        """The number of rows of each record; at least 1, so that no rows have a mean of 0, which no gradient meets."""
        if self.index is None:
            return max(1, self.num // self._size)
        return self._of_records(self.index.bincount(minlength=self._size).clamp_min(1))

    def spread(self, values: Tensor) -> Tensor:
        """Return for each row the value of its record."""
        return values.repeat_interleave(self.num // self._size) if self.index is None else values[self.index]

    def sums(self, rows: Tensor) -> Tensor:
        """Return the sum of the entries of each record."""
        with unfollowed():
            return self._of_records(self._sums(rows))

    def _sums(self, rows: Tensor) -> Tensor:
        if self.index is None:
            return rows.reshape(self._size, rows.numel() // self._size).sum(1)
        sums = rows.reshape(self.num, math.prod(rows.shape[1:])).sum(1)
        return sums.new_zeros(self._size).index_add(0, self.index, sums)

    def reduced(self, func: Any, rows: Tensor, kwargs: Any) -> Tensor:
        """Return the result of a reduction to a scalar for the rows of each record."""
        with unfollowed():
            return self._of_records(self._reduced(func, rows, kwargs))

    def _reduced(self, func: Any, rows: Tensor, kwargs: Any) -> Tensor:
        name = func.__name__
        if self.index is None:
            if name == "mean" and not rows.numel():
                return self._sums(rows)
            rows = rows.reshape(self._size, -1)
            reduced: Tensor = getattr(rows, EXTREMES[name])(1) if name in EXTREMES else func(rows, dim=1, **kwargs)
            return reduced
        if name in EXTREMES:
            extremes = getattr(rows.reshape(self.num, math.prod(rows.shape[1:])), EXTREMES[name])(1)
            target = extremes.new_zeros(self._size)
            found: Tensor = target.scatter_reduce(0, self.index, extremes, EXTREMES[name], include_self=False)
            return found
        if name in ("any", "all"):
            return self._sums(rows != 0) > 0 if name == "any" else self._sums(rows == 0) == 0
        counted = torch.ones_like(rows, dtype=torch.bool)
        if name.startswith("nan"):
            counted = rows.isnan().logical_not()
            rows = rows.where(counted, 0.0)
        rows = rows != 0 if name == "count_nonzero" else rows.to(kwargs.get("dtype") or rows.dtype)
        if name == "mean":
            mean: Tensor = self._sums(rows) / (self.counts * math.prod(rows.shape[1:]))
            return mean
        sums = self._sums(rows)
        return sums / self._sums(counted) if name == "nanmean" else sums

    def _of_records(self, values: Tensor) -> Tensor:
        return of_records(values, self._follower)


class PlacesOf:
    """The records to which the rows of tensors belong, in one batch.

    Args:
        size: records of the batch, B.
        constants: parameters and buffers of the module, which hold no records.
        owners: returns the mode that follows the owners of rows, or None.
    """

    def __init__(self, size: int, constants: Iterable[Tensor], owners: Callable[[], Follower | None]) -> None:
        self._size, self._owners, self._constants = size, owners, [*constants]
        self._ids = set(map(id, self._constants))
        self._memory: set[int] | None = None  # addresses of the constants, once they are asked for

    def __call__(self, tensor: Any) -> Places | None:
        """Return which rows of a tensor belong to which records; None if it has none, or nothing tells."""
        if not isinstance(tensor, Tensor) or is_tracked(tensor) or not tensor.dim():
            return None
        if self._size == 1:
            return Places(1, len(tensor))
        if (follower := self._owners()) is not None:
            with unfollowed():
                rows = follower.owners_of(tensor)
                if rows is None and len(tensor) == self._size and not self.is_constant(tensor) and _repeats(tensor):
                    rows = follower.samples(tensor.device)  # such as a length for each record, in torch.full
                if not isinstance(rows, Rows) or rows.axis != 0 or rows.has_nobody:
                    return None
                return Places(self._size, len(tensor), rows.index, follower)
        num = tensor.shape[0]
        by_position = num > 0 and num % self._size == 0 and not self.is_constant(tensor)
        return Places(self._size, num) if by_position else None

    def is_constant(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter or a buffer, or a view of one."""
        if id(tensor) in self._ids:
            return True
        if tensor.grad_fn is not None and not is_view(tensor):  # a result of autograd has memory of its own
            return False
        if self._memory is None:
            self._memory = {memory_of(one) for one in self._constants}
        return memory_of(tensor) in self._memory


def of_records(values: Tensor, follower: Follower | None) -> Tensor:
    """Let one value for each record have these as its owners, and return the values."""
    if follower is not None:
        follower.note(values, follower.samples(values.device))
    return values


def _repeats(tensor: Tensor) -> bool:
    """Tell whether all rows of a tensor are equal."""
    return bool((tensor == tensor[:1]).all())
