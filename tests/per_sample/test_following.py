"""Owners of rows through operations: what agrees with batches of one, and what must be refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.owners.owned import MIXED, Mixed, Rows
from lightning_dp.per_sample.owners.traits import SHOWS_NO_ENTRY
from lightning_dp.per_sample.tracking.tracker import Tracker
from lightning_dp.per_sample.tracking.uses import Recorder
from tests.per_sample.owners import _features, assert_agrees, make
from tests.per_sample.ways_of_use import Uses, drawn

LENGTHS = torch.tensor([2, 5, 1, 4, 5, 3])


def bags_of(*shape: int) -> list[Tensor]:
    """Records with 1, 3, 5, 7 rows: positions do not tell their owners."""
    return [_features(1 + 2 * i, *shape, seed=i) for i in range(4)]


def summed(rows: Tensor, bags: list[Tensor]) -> Tensor:
    """The losses of the bags, from one row for each of their rows."""
    return torch.stack([one.square().sum() for one in rows.split([len(bag) for bag in bags])])


def test_functions_that_are_not_followed_return_no_entries() -> None:
    x = torch.tensor([[3.5, 7.25]])
    for function in SHOWS_NO_ENTRY:
        shown = function(x)
        assert type(shown) in (bool, int, torch.Size, tuple, torch.dtype, torch.device, torch.layout)
        assert not {3, 7} & set(shown if isinstance(shown, tuple) else (shown,))


def test_distances_have_the_owners_of_both_kinds_of_rows() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    owners, rows, fixed = torch.tensor([0, 0, 1]), _features(3, 2), torch.ones(3, 2).double()
    follower.note(rows, Rows(0, owners))
    follower.note(fixed, None)
    with follower:
        made = torch.cdist(fixed, rows), torch.cdist(rows, fixed), torch.cdist(rows, rows)
    found = [follower.owners_of(one) for one in made]
    assert [one.axis for one in found if isinstance(one, Rows)] == [1, 0]
    assert isinstance(found[2], Mixed)


def test_memory_of_a_replaced_buffer_holds_data_again() -> None:
    buffers = [torch.ones(2)]
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, buffers)
    assert follower.owners_of(buffers[0]) is None
    buffers.clear()
    later = [torch.ones(2) for _ in range(50)]
    assert all(follower.owners_of(tensor) is MIXED for tensor in later)


@pytest.mark.parametrize("by_data", [True, False])
def test_a_repeated_row_is_changed_in_place_by_constants_only(by_data: bool) -> None:
    def changed(m: Any, x: Tensor) -> Tensor:
        types = F.embedding(torch.zeros(x.shape[:2], dtype=torch.long), m.w)
        if by_data:
            types += x
        else:
            types[:, 1:] *= 2.0
        return types * x

    module, bags = Uses(changed, w=drawn(2, 3)), bags_of(4, 3)
    with pytest.raises(PrivacyError, match="keep the samples apart") if by_data else nullcontext():
        assert_agrees(
            module, lambda batch: summed(module(torch.cat(batch)), batch), lambda chosen: [bags[i] for i in chosen]
        )


@pytest.mark.parametrize(
    "function",
    [
        lambda x, other, one: x * other,
        lambda x, other, one: one * torch.ones(4, 3),
        lambda x, other, one: F.linear(x, other),
        lambda x, other, one: torch.cat([x, other], 1),
        lambda x, other, one: torch.linalg.pinv(x),
        lambda x, other, one: torch.linalg.solve(x[1:].expand(3, 3, 3) + torch.eye(3), torch.ones(3, 3)),
        lambda x, other, one: torch.linalg.solve_triangular(x[None, 1:], other[None, 1:], upper=True),
        lambda x, other, one: F.pad(x, (0, 0, 1, -1)),
        lambda x, other, one: torch.renorm(x, 2, 0, 1.0),  # of which nothing is known
        lambda x, other, one: x.max(),
        lambda x, other, one: torch.cat([x, x]).scatter_add(0, torch.tensor([[0] * 3, [7] * 3]), other[:2]),
    ],
)
def test_results_of_several_samples_have_no_owners(function: Callable[..., Tensor]) -> None:
    x, other, one = torch.ones(4, 3), torch.ones(4, 3), torch.ones(1, 3)
    with Follower(Tracker(Recorder(), materialise=False, workspace=None), 4, []) as follower:
        follower.note(x, Rows(0, torch.arange(4)))
        follower.note(other, Rows(0, torch.tensor([1, 0, 3, 2])))
        follower.note(one, Rows(0, torch.tensor([2])))
        assert isinstance(follower.owners_of(function(x, other, one)), Mixed)


@pytest.mark.parametrize("find", [torch.where, torch.nonzero, torch.argwhere, lambda x: x.nonzero(as_tuple=True)])
def test_positions_have_the_owners_of_their_entries(find: Callable[[Tensor], Any]) -> None:
    """As many as there are samples, by chance."""
    mask = torch.tensor([[True, True], [False, False]])
    with Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, []) as follower:
        follower.note(mask, follower.samples(mask.device))
        found = find(mask)
        owners = [follower.owners_of(one) for one in (found if isinstance(found, tuple) else [found])]
    assert all(isinstance(one, Rows) and one.axis == 0 and one.index.tolist() == [0, 0] for one in owners)


EACH = torch.arange(4)[:, None]


@pytest.mark.parametrize(
    ("read", "axis"),
    [
        (lambda table, index: table[EACH, index], 0),
        (lambda table, index: table[index, EACH, :2], 0),
        (lambda table, index: table[:, index.T, ...], 2),
        (lambda table, index: table[None, index, index], 1),
        (lambda table, index: table[index, index.flip(0)], None),
        (lambda table, index: table[index, :, index], None),
        (lambda table, index: table[..., index, EACH], None),
        (lambda table, index: table[0, index], None),
        (lambda table, index: table[:, :2][index == 1, :], None),
    ],
)
def test_constants_at_several_indices_belong_to_these(read: Callable[..., Tensor], axis: int | None) -> None:
    """As a mask of the positions that each sample has chosen."""
    index = torch.tensor([[0, 1], [2, 0], [3, 1], [1, 1]])
    with Follower(Tracker(Recorder(), materialise=False, workspace=None), 4, []) as follower:
        follower.note(EACH, None)
        follower.note(index, follower.samples(index.device))
        table = torch.zeros(4, 4, 4)
        found = follower.owners_of(read(table, index))
    if axis is None:
        assert isinstance(found, Mixed)
    else:
        assert isinstance(found, Rows)
        assert (found.axis, found.index.tolist()) == (axis, [0, 1, 2, 3])


@pytest.mark.parametrize(
    "sort",
    [
        lambda x: torch.sort(x, 0, True).indices,
        lambda x: x.sort(descending=True)[1],
        lambda x: x.argsort(0, descending=True),
        lambda x: torch.argsort(input=x, dim=0, descending=True),
    ],
)
def test_equal_values_keep_their_order_in_a_sort(sort: Callable[[Tensor], Tensor]) -> None:
    """Otherwise the values of one sample would decide on the order of another's."""
    values = torch.zeros(60)
    values[::3] = 1.0
    expected = values.sort(descending=True, stable=True).indices
    assert not torch.equal(sort(values), expected)
    with Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, []):
        assert torch.equal(sort(values), expected)


@pytest.mark.parametrize("by", ["lengths", "offsets"])
def test_reduced_segments_belong_to_the_owner_of_their_rows(by: str) -> None:
    torch.manual_seed(0)
    layer, head, bags = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        lengths = torch.tensor([len(bag) for bag in batch])
        given = lengths if by == "lengths" else F.pad(lengths.cumsum(0), (1, 0))
        return head(torch.segment_reduce(layer(torch.cat(batch)), "max", **{by: given})).square().sum(1)

    assert assert_agrees(nn.ModuleList([layer, head]), loss, lambda chosen: [bags[i] for i in chosen]).follows_owners


@pytest.mark.parametrize("how", ["left", "right", "number"])
def test_tensordot_with_constants_keeps_the_owners(how: str) -> None:
    torch.manual_seed(0)
    layer, head, bags = nn.Linear(3, 4).double(), nn.Linear(2, 2).double(), bags_of(3)
    constant = torch.randn(2, 4, dtype=torch.float64)
    head.register_buffer("constant", constant)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = layer(torch.cat(batch))
        if how == "left":
            mixed = torch.tensordot(rows, constant, dims=([1], [-1]))
        elif how == "right":
            mixed = torch.tensordot(constant, rows, dims=([-1], [1])).T
        else:
            mixed = torch.tensordot(rows, constant.T, 1)
        return summed(head(mixed.tanh()), batch)

    assert assert_agrees(nn.ModuleList([layer, head]), loss, lambda chosen: [bags[i] for i in chosen]).follows_owners


def test_tensordot_over_rows_mixes_samples() -> None:
    layer, head, bags = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = layer(torch.cat(batch))
        return summed(head(torch.tensordot(torch.ones(len(rows), len(rows)).double(), rows, 1)), batch)

    with pytest.raises(PrivacyError, match="rows that come from tensordot"):
        make(nn.ModuleList([layer, head]), loss, lambda chosen: [bags[i] for i in chosen])


def test_segments_of_two_samples_are_refused() -> None:
    layer, head, bags = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = torch.cat(batch)
        lengths = torch.tensor([1, len(rows) - 1])
        return head(torch.segment_reduce(layer(rows), "sum", lengths=lengths)).square().sum(1)

    with pytest.raises(PrivacyError, match="rows that come from segment_reduce"):
        make(nn.ModuleList([layer, head]), loss, lambda chosen: [bags[i] for i in chosen])


def test_rows_in_an_order_of_the_data_agree() -> None:
    torch.manual_seed(0)
    layer, bags = nn.Linear(3, 3).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = torch.cat(batch)
        order = rows[:, 0].argsort()
        return summed(layer(rows[order])[order.argsort()], batch)

    assert assert_agrees(layer, loss, lambda chosen: [bags[i] for i in chosen]).follows_owners
