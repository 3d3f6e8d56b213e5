"""Owners of rows that are shared within a microbatch, and owners of what broadcast tensors give together."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample.owners.owned import MIXED, NOBODY, Owners, Rows


class Memo:
    """Owners that were computed earlier in the same microbatch, for operations that are repeated in every layer.

    **Guarantee**: an index is looked up by its values, so a write to it between two operations is seen. Rows are looked
    up by identity, because nothing writes to their index.
    """

    def __init__(self) -> None:
        self.known: list[Rows] = []
        """Owners that are the samples in order, or that the batch holds for rows that nothing was written to."""
        self._made: list[Rows] = []
        self._origins: dict[int, list[Rows]] = {}
        self.several: int | None = None
        """Owner of rows that several samples share, once there are such rows."""
        self._by_key: dict[Hashable, list[tuple[Tensor | None, Any, Any]]] = {}

    def shared(self, index: Tensor) -> Rows:
        """Return rows with these owners along the first axis: the same object for the same owners, so that what is
        computed from them is computed once.
        """
        num, device = index.shape[0], index.device
        for rows in (*self.known, *self._made):
            if rows.num == num and rows.index.device == device and torch.equal(rows.index, index):
                return rows
        self._made.append(Rows(0, index))
        return self._made[-1]

    def hold(self, rows: Rows) -> Rows:
        """Enter owners that the batch holds, none of them nobody; return the same object for the same owners."""
        found = self.shared(rows.index)
        if found not in self.known:
            self.known.append(found)
        found.layout.update(rows.layout, has_nobody=False)
        return found

    def owned(self, index: Tensor) -> Rows | None:
        """Return rows with owners that were computed; None if they belong to nobody."""
        return None if index.numel() and int(index.max()) == NOBODY else self.shared(index)

    def at(self, rows: Rows, index: Tensor) -> Rows | None:
        """Return the owners, along the first axis, of the rows that an index selects; None if they belong to nobody."""
        seen = self._by_key.setdefault((index.dtype, id(rows.index)), [])
        for values, _, known in seen:
            if values is not None and torch.equal(values, index):
                return known  # type: ignore[no-any-return]
        found = self.owned(rows.index[index]) if rows.has_nobody else self.shared(rows.index[index])
        seen.append((index.clone(), rows, found))  # as get() does
        if found is not None:  # its index stays alive in ``known`` or ``_made``
            if not rows.has_nobody:
                found.layout["has_nobody"] = False
            self._origins.setdefault(id(found.index), []).append(rows)
        return found

    def origins_of(self, rows: Rows) -> list[Rows]:
        """Return the rows from which an index has selected rows with these owners."""
        return self._origins.get(id(rows.index), [])

    def has_at(self, rows: Rows, index: Tensor, num: int) -> bool:
        """Tell whether an index names rows of these owners among some ``num`` rows."""
        alike = (one.index for one in (*self.known, *self._made) if one.num == num)
        return any(one.device == index.device and torch.equal(one[index], rows.index) for one in alike)

    def get(self, key: Hashable, rows: tuple[Rows | None, ...], index: Tensor | None, make: Callable[[], Any]) -> Any:
        """Return the earlier result for equal arguments, or make one.

        Args:
            key: everything else that the result depends on.
            rows: owners of the arguments.
            index: values that the result depends on.
            make: returns the result.
        """
        seen = self._by_key.setdefault((key, *[None if one is None else id(one.index) for one in rows]), [])
        for values, _, result in seen:
            if index is None or (values is not None and torch.equal(values, index)):
                return result
        result = make()
        seen.append((None if index is None else index.clone(), rows, result))  # rows stay alive: their id is the key
        return result


def merged(owners: list[tuple[int, Rows]], num_axes: int, memo: Memo) -> Owners:
    """Return the owners of a result computed entry by entry from broadcast tensors.

    Args:
        owners: number of axes and owners of each tensor that holds data.
        num_axes: number of axes of the result.
        memo: of the microbatch.
    """
    found: Rows | None = None
    whole: int | None = None
    for axes, rows in owners:
        if rows.only is not None:
            if whole not in (None, rows.only):
                return MIXED
            whole = rows.only
            continue
        assert rows.axis is not None
        here = rows.moved(rows.axis + num_axes - axes)
        if found is None:
            found = here
        elif found.axis != here.axis:
            return MIXED
        elif found.index is not here.index:
            known = memo.get(
                ("joined", found.is_identity, here.is_identity), (found, here), None, partial(_joined, found, here)
            )
            if known is None:
                return MIXED
            found = known.moved(here.axis)
    if whole is None:
        return found
    if found is None or bool(((found.index == whole) | (found.index == NOBODY)).all()):
        like = owners[0][1].index
        return Rows(None, like.new_tensor([whole])) if found is None else found
    return MIXED


def _joined(one: Rows, other: Rows) -> Rows | None:
    """Return the owners of rows that two tensors hold together; None if they have different owners."""
    if one.index.shape != other.index.shape:
        return None
    if torch.equal(one.index, other.index):
        return other if other.is_identity else one
    both = torch.maximum(one.index, other.index)
    if not all(bool(((side.index == both) | (side.index == NOBODY)).all()) for side in (one, other)):
        return None
    for side in (one, other):
        if torch.equal(side.index, both):
            return side
    return Rows(other.axis, both, is_identity=one.is_identity or other.is_identity)
