"""Sums over the rows of each record: rows that belong to records by their position, or by an index.

Legend: ``B`` records, ``R`` rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Places:
    """Rows of B records, and the record that each of R rows belongs to.

    Args:
        size: B.
        num: R.
        index: the record of each row, shape (R,); None if each record has R / B rows, in the order of the records.
    """

    def __init__(self, size: int, num: int, index: Tensor | None = None) -> None:
        self._size, self.num, self.index = size, num, index

    def are_those_of(self, other: Places | None) -> bool:
        """Tell whether other rows are as many and belong to the same records."""
        if other is None or self.num != other.num:
            return False
        mine, others = self.index, other.index
        return mine is others or (mine is not None and others is not None and torch.equal(mine, others))

    @property
    def counts(self) -> Any:
        """The number of rows of each record."""
        return self.num // self._size if self.index is None else self.index.bincount(minlength=self._size)

    def spread(self, values: Tensor) -> Tensor:
        """Return for each row the value of its record."""
        return values.repeat_interleave(self.num // self._size) if self.index is None else values[self.index]

    def sums(self, rows: Tensor) -> Tensor:
        """Return the sum of the entries of each record."""
        if self.index is None:
            return rows.reshape(self._size, -1).sum(1)
        sums = rows.reshape(self.num, math.prod(rows.shape[1:])).sum(1)
        return sums.new_zeros(self._size).index_add(0, self.index, sums)

    def reduced(self, func: Any, rows: Tensor, kwargs: Any) -> Tensor:
        """Return the result of a reduction to a scalar for the rows of each record."""
        if self.index is None:
            return func(rows.reshape(self._size, -1), dim=1, **kwargs)  # type: ignore[no-any-return]
        name, counted = func.__name__, torch.ones_like(rows, dtype=torch.bool)
        if name.startswith("nan"):
            counted = rows.isnan().logical_not()
            rows = rows.where(counted, 0.0)
        rows = rows != 0 if name == "count_nonzero" else rows.to(kwargs.get("dtype") or rows.dtype)
        return self.sums(rows) / self.sums(counted) if name.endswith("mean") else self.sums(rows)
