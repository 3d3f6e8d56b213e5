"""Owners of rows through windows, views, writes, and states that every sample repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.owners.owned import Mixed, Rows
from lightning_dp.per_sample.tracking.tracker import Tracker
from lightning_dp.per_sample.tracking.uses import Recorder
from tests.per_sample.owners import assert_agrees, make
from tests.per_sample.test_following import bags_of, summed
from tests.per_sample.ways_of_use import Uses, drawn


def test_windows_over_rows_of_two_samples_are_mixed() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 3, [])
    rows = torch.ones(3, 4)
    follower.note(rows, Rows(0, torch.arange(3)))
    with follower:
        within, over = rows.as_strided((3, 2, 3), (4, 1, 1)), rows.as_strided((2, 4), (4, 1), 2)
    assert isinstance(follower.owners_of(within), Rows)
    assert isinstance(follower.owners_of(over), Mixed)


def test_a_view_leaves_rows_of_two_samples_mixed() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    rows, made, whole = torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(2, 3)
    follower.note(rows, Rows(0, torch.tensor([0, 0, 1])))
    follower.note(made, None)
    follower.note(whole, None)
    with follower:
        whole[1].copy_(rows[2, :1])
        made[1:].add_(rows[1:])
        before = follower.owners_of(made)
        made[:2].add_(rows[1:])
    assert isinstance(before, Rows)
    assert before.index.tolist() == [-1, 0, 1]
    assert isinstance(follower.owners_of(made), Mixed)
    found = follower.owners_of(whole)
    assert isinstance(found, Rows)
    assert found.index.tolist() == [-1, 1]


@pytest.mark.parametrize(
    "take",
    [lambda made: made[:1], lambda made: made.unbind()[0], lambda made: next(iter(made)), lambda made: made.data],
    ids=["slice", "unbind", "iteration", "data"],
)
def test_a_view_of_zeros_that_rows_are_added_to_is_mixed(take: Callable[[Tensor], Tensor]) -> None:
    """Zeros of which nothing has a view may get owners without a look at other views."""
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    rows, index = torch.ones(3, 2), torch.arange(3)
    follower.note(rows, Rows(0, torch.tensor([0, 0, 1])))
    follower.note(index, None)
    with follower:
        added, made = rows.new_zeros(3, 2).index_add_(0, index, rows), rows.new_zeros(3, 2)
        view = take(made)
        before = follower.owners_of(view)
        made.index_add_(0, index, rows)
    assert before is None
    assert isinstance(follower.owners_of(view), Mixed)
    for one in (added, made):
        found = follower.owners_of(one)
        assert isinstance(found, Rows)
        assert found.index.tolist() == [0, 0, 1]


def test_sparse_data_after_a_write_is_of_unknown_owners() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    dense, sparse = torch.ones(4, 3), torch.eye(4).to_sparse()
    with follower:
        follower.note(dense, Rows(0, torch.tensor([0, 0, 1, 1])))
        follower.note(sparse, Rows(0, torch.tensor([0, 0, 1, 1])))
        part = dense[:2]
        part.mul_(torch.ones(3))
        dense[1:3] = dense.flip(0)[1:3]
        assert isinstance(follower.owners_of(sparse @ dense), Mixed)


def test_entries_shown_again_are_mixed_after_a_write() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    follower.forget()
    with follower:
        follower.note(rows := torch.rand(3, 3), Rows(0, torch.tensor([0, 1, 1])))
        shown = torch.Tensor(rows)
        assert isinstance(follower.owners_of(shown), Rows)
        shown.copy_(rows.clone().flip(0))
        assert isinstance(follower.owners_of(rows), Mixed)


ALL, LAST_TWO = slice(None), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("index", "value", "stays"),
    [
        ((Ellipsis, 1), lambda x: x[..., 0], True),
        ((ALL, LAST_TWO), lambda x: x[:, :2], True),
        ((ALL, ALL, LAST_TWO), lambda x: x[..., :1], True),
        ((ALL, None, 1), lambda x: x[:, None, 0], True),
        ((ALL, 0), lambda x: 2.0, True),
        ((ALL, 0), lambda x: torch.ones(3), True),
        ((ALL, 0), lambda x: x.flip(0)[:, 1], False),
        ((ALL, ALL), lambda x: x[:, 0], False),  # the rows of a batch of three stand at three places of each row
        ((ALL, 0), lambda x: x[0], False),
        ((torch.tensor([2, 1, 0]),), lambda x: x, False),
        ((slice(0, 1),), lambda x: x[1:2], False),
    ],
)
def test_owners_after_a_write_are_those_of_what_is_written(
    index: Any, value: Callable[[Tensor], Any], stays: bool
) -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 3, [])
    with follower:
        follower.note(LAST_TWO, None)
        follower.note(x := torch.rand(3, 3, 3), follower.samples(x.device))
        x[index] = value(x.clone())
        owners = follower.owners_of(x)
    assert (owners is follower.samples(x.device)) == stays


def test_a_state_repeated_for_every_sample_agrees() -> None:
    torch.manual_seed(0)

    def function(m: Any, x: Tensor) -> Tensor:
        return m.next(m.layer(x, m.state.expand(len(x), -1)))[0] * m.gain.repeat(len(x), 1)

    first = nn.Linear(3, 3).double()
    held = {
        "first": first,
        "layer": nn.GRUCell(3, 3),
        "next": nn.LSTMCell(3, 3),
        "state": drawn(1, 3),
        "gain": drawn(1, 3),
    }
    module, bags = Uses(function, **held), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = first(torch.cat(batch)).split([len(bag) for bag in batch])
        return module(torch.stack([one.mean(0) for one in rows])).square().sum(1)

    for size in (2, 3, 4):
        engine = assert_agrees(module, loss, lambda chosen: [bags[i].clone() for i in chosen], size=size)
        assert engine.follows_owners


def test_an_index_written_between_two_uses_is_read_again() -> None:
    torch.manual_seed(0)
    layer, bags = nn.Linear(3, 3).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = torch.cat(batch)
        index = torch.arange(len(rows))
        once = layer(rows[index])
        index.numpy()[:] = index.flip(0).numpy()  # no operation of torch reports it
        again = layer(rows[index]).flip(0)
        return summed(once, batch) + summed(again.tanh(), batch)

    assert assert_agrees(layer, loss, lambda chosen: [bags[i] for i in chosen]).follows_owners


@pytest.mark.parametrize("name", ["sample_of_row", "batch"])
def test_owners_of_a_batch_stay_if_the_step_writes_to_it(name: str) -> None:
    layer, head, bags = nn.Linear(3, 3).double(), nn.Linear(3, 1).double(), bags_of(3)

    def batch_of(chosen: list[int]) -> dict[str, Tensor]:
        counts = torch.tensor([len(bags[i]) for i in chosen])
        owners = torch.arange(len(chosen)).repeat_interleave(counts)
        found = {"x": torch.cat([bags[i] for i in chosen]), "y": torch.zeros(len(chosen), 3), name: owners}
        return found | ({"ptr": nn.functional.pad(counts.cumsum(0), (1, 0))} if name == "batch" else {})

    def loss(batch: dict[str, Tensor]) -> Tensor:
        rows = layer(batch["x"])
        batch[name].zero_()
        return head(rows.new_zeros(batch["y"].shape).index_add(0, batch[name], rows)).sum(1)

    with pytest.raises(PrivacyError, match="rows that come from index_add"):
        make(nn.ModuleList([layer, head]), loss, batch_of)
