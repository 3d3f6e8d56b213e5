"""Owners of views, read from strides, against labels of all entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.owners.memo import Memo
from lightning_dp.per_sample.owners.owned import Mixed, Rows
from lightning_dp.per_sample.owners.reductions import Step
from lightning_dp.per_sample.owners.views import moved_rows, owners_of_view
from lightning_dp.per_sample.tracking.arguments import tensors_in
from lightning_dp.per_sample.tracking.tracker import Tracker
from lightning_dp.per_sample.tracking.uses import Recorder
from tests.cases import each

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


@each("axis", [0, 1, 2])
@each(
    "name, given",
    [
        ("transpose", (0, -1)),
        ("swapaxes", (0, 1)),
        ("permute", (2, 0, 1)),
        ("permute", ((1, 2, 0),)),
        ("unsqueeze", (1,)),
        ("unsqueeze", (-1,)),
        ("expand", (5, 5, 5, 5)),
        ("reshape", (5, 5, 5, 1)),
        ("split", (2, 1)),
        ("split", ([1, 4],)),
        ("chunk", (2, -1)),
    ],
)
def test_rows_that_a_named_operation_moves_keep_owners(name: str, given: Any, axis: int) -> None:
    x, rows, move = torch.zeros(5, 5, 5), Rows(axis, torch.tensor([2, 0, -1, 1, 1])), getattr(Tensor, name)
    out = move(x, *given)
    step = Step(move, (x, *given), {}, out, [(x, rows)], torch.arange(3), Memo())
    found: Any = moved_rows(step, name, x, rows)
    labels = tensors_in((move(rows.labels(x.shape), *given),), {})
    for one, expected in zip([found] if isinstance(found, Rows) else found, labels, strict=True):
        assert torch.equal(one.labels(expected.shape), expected)


@pytest.mark.parametrize(
    ("before", "axis", "written"),
    [
        pytest.param([1, 1, 0], 0, [0, 0], id="rows of another sample before it"),
        pytest.param([0, 0, 1], 0, [1, 1], id="rows of another sample after it"),
        pytest.param([0, 0, 1], 1, [0, 1], id="columns of two samples"),
    ],
)
def test_a_base_with_rows_written_of_other_samples_is_mixed(before: list[int], axis: int, written: list[int]) -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    base, other = torch.ones(3, 2), torch.zeros(2, 2)
    follower.note(base, Rows(0, torch.tensor(before)))
    follower.note(other, Rows(axis, torch.tensor(written)))
    with follower:
        view = base[:2]
        view[:] = other
    assert isinstance(follower.owners_of(base), Mixed)


def test_a_base_gets_the_owners_of_the_axis_that_was_written() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    base, columns = torch.zeros(3, 2), torch.ones(2, 2)
    follower.note(base, None)
    follower.note(columns, Rows(1, torch.tensor([1, 0])))
    with follower:
        base[:2].copy_(columns)
    found = follower.owners_of(base)
    assert isinstance(found, Rows)
    assert (found.axis, found.index.tolist()) == (1, [1, 0])
