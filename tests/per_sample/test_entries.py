"""Owners of single entries: columns that are sorted each by itself, and sorted back by the number of their graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.owners.owned import Entries, Mixed, Owners, Rows
from lightning_dp.per_sample.tracking.tracker import Tracker
from lightning_dp.per_sample.tracking.uses import Recorder
from tests.cases import each
from tests.per_sample.owners import _collate_graphs, _graph, assert_agrees, make


class Sorted(nn.Module):
    """The nodes of all graphs, sorted in each column; then either the lower median of each graph, or ranks."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.head = how, nn.Linear(3, 5), nn.Linear(5, 1)
        self.double()

    def forward(self, graphs: dict[str, Tensor]) -> Tensor:
        x, owner = self.first(graphs["x"]), graphs["batch"]
        counts = owner.bincount()
        values, places = x.sort(0)
        if self.how == "ranks":
            ranks = places.argsort(0)
            return self.head((ranks * x).new_zeros(len(counts), 5).index_add(0, owner, ranks * x)).square().sum(1)
        if self.how == "largest":
            return self.head(values[-len(counts) :]).square().sum(1)
        owners = owner[:, None].expand_as(x).take_along_dim(places, 0)
        ordered = values.take_along_dim(owners.sort(dim=0, stable=True).indices, 0)
        middle = counts.cumsum(0) - counts + (counts - 1) // 2
        return self.head(ordered.index_select(0, middle)).square().sum(1)


def test_medians_of_graphs_agree_with_batches_of_one() -> None:
    torch.manual_seed(0)
    module, graphs = Sorted("medians"), [_graph(i) for i in range(6)]
    engine = assert_agrees(module, module, lambda chosen: _collate_graphs([graphs[i] for i in chosen]))
    assert engine.follows_owners


@pytest.mark.parametrize("how", ["ranks", "largest"])
def test_places_among_all_rows_are_no_data_of_one(how: str) -> None:
    torch.manual_seed(0)
    module, graphs = Sorted(how), [_graph(i) for i in range(6)]
    with pytest.raises(PrivacyError, match="rows of known samples, got rows that come from"):
        make(module, module, lambda chosen: _collate_graphs([graphs[i] for i in chosen]))


def put_into(x: Tensor) -> Tensor:
    """A view of the memory that sorted entries were put into, made before."""
    made = torch.zeros(4, 4)
    view = made.T
    torch.take_along_dim(x.repeat(1, 2).sort(0).values, torch.arange(4)[:, None].expand(4, 4), 0, out=made)
    return view


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], type]] = {
    "sorted": (lambda x: x.sort(0).values, Entries),
    "in another shape": (lambda x: x.sort(0).values.view(2, 2, 2), Entries),
    "in one column": (lambda x: x.sort(0).values[:, 0], Rows),
    "selected": (lambda x: x.sort(0).values.index_select(1, torch.tensor([1])), Rows),
    "in pieces": (lambda x: x.sort(0).values.split(1, 1)[0], Rows),
    "in the row of both": (lambda x: x.sort(0).values[0], Rows),
    "sorted again": (lambda x: x.sort(0).values.sort(1).values, Entries),
    "reshaped and back": (lambda x: x.view(2, 4).view(4, 2), Rows),
    "as other numbers": (lambda x: x.sort(0).values.view(torch.int32), Mixed),
    "computed with": (lambda x: x.sort(0).values * 2.0, Mixed),
    "computed with one": (lambda x: x.sort(0).values * x, Mixed),
    "summed": (lambda x: x.sort(0).values.sum(1), Mixed),
    "written": (lambda x: x.sort(0).values.add_(1.0), Mixed),
    "a view that was made before": (lambda x: (lambda y: (y[:, 0], y.mul_(2.0))[0])(x.sort(0).values), Mixed),
    "a view that they were written to": (put_into, Mixed),
    "places": (lambda x: x.sort(0).indices, Mixed),
    "ranks": (lambda x: x.sort(0).indices.argsort(0), Mixed),
    "in float": (lambda x: x.sort(0).values.float(), Mixed),
}


@each("how", MOVES)
def test_moved_entries_keep_their_owners(how: str) -> None:
    follower, (move, kind) = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, []), MOVES[how]
    rows = torch.tensor([[1.0, 8.0], [3.0, 2.0], [2.0, 7.0], [4.0, 1.0]])
    follower.note(rows, Rows(0, torch.tensor([0, 0, 1, 1])))
    with follower:
        found: Owners = follower.owners_of(move(rows))
    assert type(found) is kind


def test_sorted_entries_name_their_owners() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    rows = torch.tensor([[1.0, 8.0], [3.0, 2.0], [2.0, 7.0], [4.0, 1.0]])
    follower.note(rows, Rows(0, torch.tensor([0, 0, 1, 1])))
    with follower:
        values = rows.sort(0).values
        found, column = follower.owners_of(values), follower.owners_of(values[:, 0])
        follower.hand_on([values], [handed := torch.zeros(4, 2)])
    assert type(follower.owners_of(handed)) is Mixed
    assert isinstance(found, Entries)
    assert isinstance(column, Rows)
    assert found.labels.tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert column.index.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("pick", [lambda ones, mask: ones[mask], lambda ones, mask: ones.view(2, 2)[mask.view(2, 2)]])
def test_constants_that_a_mask_picks_belong_to_its_owners(pick: Callable[[Tensor, Tensor], Tensor]) -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    rows = torch.tensor([1.0, -1.0, 1.0, 1.0])
    follower.note(rows, Rows(0, torch.tensor([0, 0, 1, 1])))
    with follower:
        found = follower.owners_of(pick(torch.ones(4), rows > 0))
    assert isinstance(found, Rows)
    assert found.axis == 0
    assert found.index.tolist() == [0, 1, 1]
