"""Sums over the rows of each record: rows that belong to records by their position, or by an index.

Legend: ``B`` records, ``R`` rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.owners.loss_kinds import EXTREMES


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
        if self.index is None:
            return rows.reshape(self._size, rows.numel() // self._size).sum(1)
        sums = rows.reshape(self.num, math.prod(rows.shape[1:])).sum(1)
        return self._of_records(sums.new_zeros(self._size).index_add(0, self.index, sums))

    def reduced(self, func: Any, rows: Tensor, kwargs: Any) -> Tensor:
        """Return the result of a reduction to a scalar for the rows of each record."""
        name = func.__name__
        if self.index is None:
            if name == "mean" and not rows.numel():
                return self.sums(rows)
            rows = rows.reshape(self._size, -1)
            reduced: Tensor = getattr(rows, EXTREMES[name])(1) if name in EXTREMES else func(rows, dim=1, **kwargs)
            return reduced
        if name in EXTREMES:
            extremes = getattr(rows.reshape(self.num, math.prod(rows.shape[1:])), EXTREMES[name])(1)
            target = extremes.new_zeros(self._size)
            return self._of_records(target.scatter_reduce(0, self.index, extremes, EXTREMES[name], include_self=False))
        if name in ("any", "all"):
            return self.sums(rows != 0) > 0 if name == "any" else self.sums(rows == 0) == 0
        counted = torch.ones_like(rows, dtype=torch.bool)
        if name.startswith("nan"):
            counted = rows.isnan().logical_not()
            rows = rows.where(counted, 0.0)
        rows = rows != 0 if name == "count_nonzero" else rows.to(kwargs.get("dtype") or rows.dtype)
        if name == "mean":
            mean: Tensor = self.sums(rows) / (self.counts * math.prod(rows.shape[1:]))
            return mean
        sums = self.sums(rows)
        return sums / self.sums(counted) if name == "nanmean" else sums

    def _of_records(self, values: Tensor) -> Tensor:
        """Let one value for each record have these as its owners."""
        if self._follower is not None:
            self._follower.note(values, self._follower.samples(values.device))
        return values
