"""Owners of sparse matrices, such as the adjacency of all graphs of a batch: of each row, or of each column.

An entry belongs to the owner of its row. A product adds up rows of its right factor; its rows have owners if no sum
holds rows of several samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import places_of
from lightning_dp.per_sample.owners import reductions
from lightning_dp.per_sample.owners.adding import after_adding
from lightning_dp.per_sample.owners.memo import Memo, merged
from lightning_dp.per_sample.owners.owned import MIXED, Mixed, Owners, Rows
from lightning_dp.per_sample.owners.reductions import Found, Step

_ENTRIES = {
    "sparse_coo_tensor": ("indices", "values"),
    "sparse_csr_tensor": (None, "col_indices", "values"),
    "sparse_csc_tensor": (None, "row_indices", "values"),
}
"""Operations that make a sparse matrix, with their arguments that hold one thing per entry."""

MAKING = frozenset(_ENTRIES)
"""Names of operations that make a sparse matrix of its entries."""


def entries_given(name: str, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Return the arguments, by name, that have one thing per entry of the sparse matrix that an operation makes."""
    given = {**dict(zip(_ENTRIES[name], args, strict=False)), **kwargs}
    return {one: given[one] for one in _ENTRIES[name] if one is not None and isinstance(given.get(one), Tensor)}


def _of_entries(matrix: Tensor, rows: Rows, memo: Memo) -> Rows | None:
    """Return the owner of every entry; None if these belong to nobody."""
    assert rows.axis is not None
    return memo.at(rows, places_of(matrix)[rows.axis])


def _by_row(matrix: Tensor, entries: Owners, memo: Memo) -> Owners:
    """Return the owners of a matrix' rows, given those of its entries along the first axis."""
    if not isinstance(entries, Rows):
        return entries
    return after_adding(matrix, 0, places_of(matrix)[0], None, entries, memo)


def _made(step: Step) -> Found:
    """Return the owners of a matrix that is made of its entries."""
    given, of = entries_given(step.func.__name__, step.args, step.kwargs), {id(one): rows for one, rows in step.owned}
    found = [(name, of[id(tensor)]) for name, tensor in given.items() if id(tensor) in of]
    if any(rows.axis != (name == "indices") for name, rows in found):
        return MIXED
    return _by_row(step.out, merged([(1, rows.moved(0)) for _, rows in found], 1, step.memo), step.memo)


def _shown(step: Step) -> Found:
    """Return the owners of the entries, or of their rows and columns."""
    (matrix, rows), name = step.owned[0], step.func.__name__
    found = _of_entries(matrix, rows, step.memo)
    return found.moved(1) if found is not None and name.endswith("indices") and step.out.dim() == 2 else found


def _same(step: Step) -> Found:
    """Return the owners of the same matrix in another form."""
    return step.owned[0][1]


def _multiplied(step: Step) -> Found:
    """Return the owners of a product: those of the rows of the right factor that the left one adds up."""
    left, right = (step.args[1], step.args[0]) if step.func.__name__ == "__rmatmul__" else step.args[:2]
    if left.layout is torch.strided:
        return reductions.matmul(step)
    of, (row, column), memo = {id(tensor): rows for tensor, rows in step.owned}, places_of(left), step.memo
    mine, others = of.get(id(left)), of.get(id(right))
    if others is not None and others.axis == 1:
        if right.layout is torch.strided:
            return others if mine is None else MIXED
        of_rows = _by_row(right, _of_entries(right, others, memo), memo)
        if isinstance(of_rows, Mixed):
            return MIXED
        others = of_rows
    given = [
        None if mine is None else _of_entries(left, mine, memo),
        None if others is None else memo.at(others, column),
    ]
    entries: Owners = merged([(1, rows) for rows in given if rows is not None], 1, memo)
    if not isinstance(entries, Rows):
        return entries
    return after_adding(step.out, 0, row, None, entries, memo)


_SHOWING = "indices _indices col_indices row_indices values _values"
_FORMS = "coalesce _coalesced_ to_sparse to_sparse_coo to_sparse_csr to_sparse_csc to_dense"

HANDLERS: dict[str, Callable[[Step], Found]] = {
    **dict.fromkeys(MAKING, _made),
    **dict.fromkeys(_SHOWING.split(), _shown),
    **dict.fromkeys(_FORMS.split(), _same),
    **dict.fromkeys(("matmul", "mm", "mv", "spmm", "_sparse_mm", "__matmul__", "__rmatmul__"), _multiplied),
}
