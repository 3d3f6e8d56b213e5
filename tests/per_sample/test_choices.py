"""Operations that choose rows of samples, one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample.owners.choices import chooses_rows
from lightning_dp.per_sample.owners.owned import MIXED, Entries, Owners, Rows
from tests.cases import each

SIZE = 3
X = torch.zeros(3, 2, 4)
"""One entry of axis 0 for each sample."""
FOLD = torch.zeros(6, 4)
"""Two rows of each sample."""
ONE = torch.zeros(2, 4)
"""Rows of the second sample."""
VALUES_OF_ROWS = torch.zeros(4, 3)
"""One entry of axis 1 for each sample."""
SORTED = torch.zeros(3, 2)
"""Columns that were sorted, each by itself."""
PLACES = torch.tensor([2, 0, 1])
"""A constant."""
VALUES = torch.tensor([2, 0, 1])
"""An index that the data gives."""
MASK = torch.ones(3, 2, dtype=torch.bool)
"""A mask that the data gives."""


def owners_of(tensor: Tensor) -> Owners:
    if tensor is X or tensor is MASK:
        return Rows(0, torch.arange(SIZE))
    if tensor is FOLD:
        return Rows(0, torch.arange(SIZE).repeat_interleave(2))
    if tensor is ONE:
        return Rows(None, torch.tensor([1]))
    if tensor is VALUES_OF_ROWS:
        return Rows(1, torch.arange(SIZE))
    if tensor is SORTED:
        return Entries.of(torch.zeros(3, 2, dtype=torch.long), "sort")
    return MIXED if tensor is VALUES else None


@each(
    "name, args, chooses",
    [
        ("__getitem__", (X, MASK), True),
        ("__getitem__", (SORTED, 0), True),
        ("sort", (X,), False),
        ("sort", (VALUES_OF_ROWS,), True),
        ("masked_select", (X, MASK), True),
        ("masked_select", (X, torch.ones(2, 1, dtype=torch.bool)), False),
        ("masked_select", (X, torch.ones(1, 2, 4, dtype=torch.bool)), False),
        ("masked_select", (X, torch.ones(3, 1, 1, dtype=torch.bool)), True),
        ("__getitem__", (X, (slice(None), MASK[0])), False),
        ("__getitem__", (X, PLACES), False),
        ("__getitem__", (X, VALUES), True),
        ("__getitem__", (X, (PLACES, VALUES)), False),
        ("__getitem__", (X, (VALUES, VALUES)), True),
        ("__getitem__", (X, (Ellipsis, VALUES)), False),
        ("__getitem__", (X, (None, VALUES)), True),
        ("__getitem__", (X, slice(2)), False),
        ("__getitem__", (FOLD, slice(2)), True),
        ("__getitem__", (FOLD, slice(None)), False),
        ("__getitem__", (FOLD, PLACES), True),
        ("__getitem__", (FOLD, 0), False),
        ("__getitem__", (FOLD, [0, 1]), True),
        ("__getitem__", (X, (range(3), [0, 1, 1])), False),
        ("__getitem__", (X, (range(2), [0, 1])), True),
        ("__getitem__", (FOLD, [slice(None), slice(2)]), False),
        ("__getitem__", (X, torch.tensor([0, 1])), True),
        ("nonzero", (MASK,), True),
        ("where", (MASK,), True),
        ("where", (MASK, X, X), False),
        ("argsort", (X,), False),
        ("stack", ([ONE, ONE],), True),
        ("stack", ([X, X],), False),
        ("__setitem__", (torch.zeros(3, 2, 4), VALUES, X), True),
        ("__setitem__", (X, MASK, 0.0), False),
        ("__setitem__", (X, (Ellipsis, torch.tensor([1])), X[..., :1]), False),
        ("__setitem__", (FOLD, (Ellipsis, torch.tensor([1])), FOLD), False),
        ("__setitem__", (FOLD, VALUES, X), True),
        ("index_select", (X, 0, VALUES), True),
        ("index_select", (X, -1, VALUES), False),
        ("gather", (X, 1, VALUES), False),
        ("repeat_interleave", (X, VALUES, 0), True),
        ("repeat_interleave", (X, 2, 0), False),
        ("cat", ([X, X],), False),
        ("cat", ([ONE, ONE],), True),
        ("cat", ([FOLD, PLACES],), False),
        ("add", (X, X), False),
        ("__getitem__", (PLACES, VALUES), False),
    ],
)
def test_choices_of_rows_are_told_from_moves(name: str, args: Any, chooses: bool) -> None:
    assert chooses_rows(name, args, {}, owners_of, SIZE) == chooses
