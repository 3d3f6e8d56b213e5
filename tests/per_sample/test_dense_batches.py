"""Rows that a step writes into a dense batch, at positions that running sums of their numbers give."""

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
from tests.per_sample.owners import _collate_graphs, _features, _graph, assert_agrees, make

Graphs = dict[str, Tensor]


def starts_of(batch: Tensor) -> Tensor:
    """The number of the first row of each sample, written into a part of a new tensor."""
    counts = torch.zeros(int(batch.max()) + 1, dtype=torch.long).scatter_add_(0, batch, torch.ones_like(batch))
    starts = counts.new_empty(len(counts) + 1)
    starts.narrow(0, 0, 1).zero_()
    torch.cumsum(counts, 0, out=starts.narrow(0, 1, len(counts)))
    return starts


def dense(rows: Tensor, batch: Tensor, longest: int | None) -> tuple[Tensor, Tensor]:
    """The rows as ``(B, K, ...)``, and which of these exist; the last position, cut off, takes those beyond K."""
    within = torch.arange(len(rows)) - starts_of(batch)[batch]
    width, size = longest or int(within.max()) + 1, int(batch.max()) + 1
    at = torch.where(within < width, batch * width + within, size * width)
    if longest == 0:
        out, exist = rows.new_zeros(size, width, *rows.shape[1:]), torch.zeros(size, width, dtype=torch.bool)
        out[batch, within], exist[batch, within] = rows, True
        return out, exist
    out, exist = rows.new_zeros(size * width + 1, *rows.shape[1:]), torch.zeros(size * width + 1, dtype=torch.bool)
    out[at] = rows
    exist[at] = True
    return out[:-1].view(size, width, *rows.shape[1:]), exist[:-1].view(size, width)


def adjacency(batch: Graphs) -> Tensor:
    """The number of edges between the nodes of each graph, ``(B, K, K)``."""
    owners, (first, second) = batch["batch"], batch["edge_index"]
    starts = starts_of(owners)
    size, width = len(starts) - 1, int(starts.diff().max())
    at = (owners[first] * width + first - starts[owners][first]) * width + second - starts[owners][second]
    numbers = torch.zeros(size * width**2).double().scatter_add(0, at, torch.ones(len(at)).double())
    return numbers.view(size, width, width)


class Dense(nn.Module):
    """A layer of nodes, and then attention, or products with the adjacency, in a dense batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.longest = how, {"too few places": 4, "by two indices": 0}.get(how)
        self.first, self.last, self.types = nn.Linear(3, 4), nn.Linear(4, 1), nn.Embedding(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.double()

    def forward(self, batch: Graphs) -> Tensor:
        nodes = self.first(batch["x"]).tanh()
        rows, exist = dense(nodes, batch["batch"], self.longest)
        if self.how == "adjacency":
            rows = self.first(adjacency(batch) @ rows[:, :, :3]) * exist[:, :, None]
        else:
            rows = self.attention(rows, rows, rows, key_padding_mask=~exist, need_weights=False)[0]
        if self.how == "back to rows":
            back = self.last(rows[exist] + nodes).squeeze(1).square()
            return torch.zeros(len(rows)).double().index_add(0, batch["batch"], back)
        if self.how == "types of positions":
            rows = rows + self.types(exist.long())
        return self.last((rows * exist[:, :, None]).sum(1)).squeeze(1).square()


@pytest.mark.parametrize(
    "how", ["attention", "by two indices", "back to rows", "types of positions", "adjacency", "too few places"]
)
def test_dense_batches_agree_with_batches_of_one(how: str) -> None:
    torch.manual_seed(0)
    module, graphs = Dense(how), [_graph(i) for i in range(4)]
    for unused in {
        "attention": [module.types],
        "by two indices": [module.types],
        "adjacency": [module.types, module.attention],
    }.get(how, []):
        unused.requires_grad_(False)
    if how in ("back to rows", "too few places"):
        module.types.requires_grad_(False)
    engine = assert_agrees(module, module, lambda chosen: _collate_graphs([graphs[i] for i in chosen]))
    assert engine.follows_owners


class Crowded(nn.Module):
    """Rows of all graphs that are written to few positions, whatever graph they are of."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.layer, self.cut = nn.Linear(3, 1, bias=False).double(), cut

    def forward(self, batch: Graphs) -> Tensor:
        rows, owners = batch["x"], batch["batch"]
        size = int(owners.max()) + 1
        crowd = torch.zeros(size + 2, 3).double()
        is_first = torch.arange(len(rows)) == starts_of(owners)[owners]
        crowd[torch.where(is_first, owners, size)] = rows
        made = self.layer(crowd[:size] if self.cut else crowd).squeeze(1)
        return made[:size] + made[size:].sum() / size


@pytest.mark.parametrize("cut", [True, False])
def test_rows_at_one_position_are_refused_unless_cut_off(*, cut: bool) -> None:
    module, graphs = Crowded(cut=cut), [_graph(i) for i in range(4)]

    def batch_of(chosen: list[int]) -> Any:
        return _collate_graphs([graphs[i] for i in chosen])

    if cut:
        assert_agrees(module, module, batch_of)
    else:
        with pytest.raises(PrivacyError, match="rows of several samples that were written to one position"):
            make(module, module, batch_of)


def followed() -> tuple[Follower, Tensor, Tensor]:
    """A follower of 3 samples, with their 6 rows and the owners of these."""
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 3, [])
    owners, rows = torch.tensor([0, 0, 1, 2, 2, 2]), _features(6, 2)
    of_rows = follower.memo.hold(Rows(0, owners.clone()))
    for tensor in (owners, rows):
        follower.note(tensor, of_rows)
    return follower, owners, rows


def written_by_values(owners: Tensor, rows: Tensor) -> Tensor:
    """Rows that are written to positions which the largest value of all shifts."""
    made = torch.zeros_like(rows)
    made[(torch.arange(6) + rows.argmax() + 1) % 6] = rows
    return made


NO_POSITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "running sums of values": lambda owners, rows: rows.cumsum(0) > rows,
    "whole running sums of values": lambda owners, rows: owners - rows[:, 0].cumsum(0).long(),
    "largest before": lambda owners, rows: owners - owners.cummax(0).values,
    "positions that a value shifts": written_by_values,
    "largest of all": lambda owners, rows: owners - owners.max(),
    "running sums of what rows hold": lambda owners, rows: owners - (rows[:, 0] > 0).long().cumsum(0),
    "running sums of numbers of some rows": lambda owners, rows: owners - starts_of(owners[:4])[owners],
    "one running sum for all rows": lambda owners, rows: owners - starts_of(owners)[-1],
    "ranks": lambda owners, rows: rows[:, 0].argsort().argsort(),
    "order of a sort": lambda owners, rows: rows[:, 0].sort().indices,
    "places among all values": lambda owners, rows: torch.bucketize(*[rows[:, 0].clone()] * 2),
    "fractions": lambda owners, rows: owners / starts_of(owners)[owners],
}


@pytest.mark.parametrize("how", list(NO_POSITIONS))
def test_results_that_are_no_positions_stay_mixed(how: str) -> None:
    follower, owners, rows = followed()
    with follower:
        made = NO_POSITIONS[how](owners, rows)
    assert isinstance(follower.owners_of(made), Mixed)


def test_positions_within_samples_have_the_owners_of_rows() -> None:
    follower, owners, _ = followed()
    with follower:
        starts = starts_of(owners)[owners]
        made = torch.where(torch.arange(6) < starts, owners * 2 - starts, 7)
    found = follower.owners_of(made)
    assert isinstance(found, Rows)
    assert found.axis == 0
    assert torch.equal(found.index, torch.tensor([0, 0, 1, 2, 2, 2]))


def test_a_view_of_written_memory_names_the_operation() -> None:
    follower, owners, _ = followed()
    with follower:
        made = starts_of(owners)
    assert follower.owners_of(made) == Mixed("cumsum", is_running=True)


def test_constants_belong_to_the_sample_that_puts_them() -> None:
    follower, owners, _ = followed()
    with follower:
        made, pairs = torch.zeros(8, 2), torch.zeros(6, 3)
        made[owners + torch.tensor([0, 1, 2, 3, 4, 5])] = 1.0
        pairs[torch.arange(6), owners] = 1.0
    found = [follower.owners_of(one) for one in (made, pairs)]
    assert [one.index.tolist() for one in found if isinstance(one, Rows)] == [
        [0, 0, -1, 1, -1, 2, 2, 2],
        [0, 0, 1, 2, 2, 2],
    ]


def test_constants_at_pairs_of_two_samples_are_mixed() -> None:
    follower, owners, _ = followed()
    with follower:
        made = torch.zeros(3, 3)
        made[owners, owners.flip(0)] = 1.0
    assert isinstance(follower.owners_of(made), Mixed)
