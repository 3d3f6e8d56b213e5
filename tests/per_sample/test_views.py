"""Owners of views, read from strides, against labels of all entries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_dp.per_sample.owned import Memo, Rows
from lightning_dp.per_sample.views import owners_of_view

Move = Callable[[Tensor], Tensor]

# shape, axis of the owners, what was done before, and the view whose owners are asked for
VIEWS: dict[str, tuple[tuple[int, ...], int, Move, Move]] = {
    "transposed": ((5, 3, 2), 0, torch.clone, lambda x: x.transpose(0, 2)),
    "expanded": ((5, 3), 0, torch.clone, lambda x: x.unsqueeze(1).expand(5, 4, 3)),
    "of an expanded one": ((5, 1), 0, lambda x: x.expand(5, 4), lambda x: x.T),
    "later axes merged": ((5, 3, 2), 0, torch.clone, lambda x: x.flatten(1)),
    "last of two rows": ((2, 5), 1, torch.clone, lambda x: x[1]),
    "other axis cut": ((5, 6), 0, torch.clone, lambda x: x[:, 1:4]),
    "cut and turned": ((3, 5, 4), 1, lambda x: x[..., :2], lambda x: x.permute(2, 1, 0)),
    "every second": ((5, 3), 0, torch.clone, lambda x: x[1::2]),
    "part of rows": ((6, 3), 0, torch.clone, lambda x: x.narrow(0, 2, 3)),
    "windows along others": ((5, 4), 0, torch.clone, lambda x: x.unfold(1, 2, 1)),
}


@pytest.mark.parametrize("name", list(VIEWS))
def test_owners_of_view_are_those_of_its_entries(name: str) -> None:
    shape, axis, before, view = VIEWS[name]
    x, index = before(torch.zeros(shape)), torch.tensor([2, 0, -1, 1, 1, 3])[: shape[axis]]
    rows = Rows(axis, index)
    found = owners_of_view(x, rows, view(x), Memo())
    assert found is not None
    labels = view(before(rows.labels(torch.Size(shape)).clone()))
    assert torch.equal(found.labels(view(x).shape), labels)


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.flatten(),
        lambda x: x.view(3, 5, 2).transpose(0, 1),
        lambda x: x.diagonal(),
        lambda x: x.unfold(0, 2, 1),
        lambda x: x.as_strided((5, 2), (2, 6)),
        lambda x: x.clone(),
        lambda x: x.view(torch.int32),
    ],
)
def test_owners_of_view_are_unknown_where_rows_are_split(move: Move) -> None:
    x = torch.zeros(5, 6)
    assert owners_of_view(x, Rows(0, torch.arange(5)), move(x), Memo()) is None
