"""Rows that belong to samples by an index: graphs, sets, packed sequences, and loops over samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.per_sample.owners.batch_owners import BatchOwners
from lightning_dp.per_sample.owners.counting import counted
from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.owners.memo import Memo
from lightning_dp.per_sample.owners.owned import Mixed, Rows
from lightning_dp.per_sample.tracking.tracker import Tracker
from lightning_dp.per_sample.tracking.uses import Recorder
from tests.cases import each
from tests.per_sample.owners import (
    GCN,
    Graphs,
    SlottedGraphs,
    _collate_graphs,
    _features,
    _graph,
    assert_agrees,
    record,
)

# ---------------------------------------------------------------- loops over samples


class Loop(nn.Module):
    """The same layers, for one sample at a time."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)
        self.gain = nn.Parameter(torch.randn(4))
        self.double()

    def one(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh() * self.gain)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "slices":
            return torch.cat([self.one(x[i : i + 1]) for i in range(len(x))]).squeeze(1)
        if self.how == "indices":
            return torch.stack([self.one(x[i]) for i in range(len(x))]).squeeze(1)
        if self.how == "unbind":
            return torch.stack([self.one(row).sum() for row in x.unbind(0)])
        if self.how == "iteration":
            return torch.stack([self.one(row).sum() for row in x])
        if self.how == "split":
            return torch.cat([self.one(row) for row in x.split(1)]).squeeze(1)
        if self.how == "sum of losses":
            total = torch.zeros((), dtype=x.dtype)
            for i in range(len(x)):
                total = total + self.one(x[i]).square().sum()
            return total
        if self.how == "two loops":
            hidden = [self.first(row) for row in x]
            return torch.stack([self.last(self.norm(row) * self.gain).sum() for row in reversed(hidden)]).flip(0)
        if self.how == "written in place":
            out = torch.zeros(len(x), 1, dtype=x.dtype)
            for i in range(len(x)):
                out[i] = self.one(x[i])
            return (self.last.weight.sum() * out).squeeze(1)
        if self.how == "a subset":
            return torch.stack([self.one(row).sum() if row[0] > 0 else self.one(row).square().sum() for row in x])
        # a loop in front of a batch
        return self.last(torch.stack([self.norm(self.first(row)) for row in x]) * self.gain).squeeze(1)


HOWS = [
    "slices",
    "indices",
    "unbind",
    "iteration",
    "split",
    "sum of losses",
    "two loops",
    "written in place",
    "a subset",
    "before a batch",
]


@pytest.mark.parametrize("how", HOWS)
def test_loops_over_samples_agree_with_batches_of_one(how: str) -> None:
    torch.manual_seed(0)
    module, data = Loop(how), _features(6, 3)
    engine = assert_agrees(module, module, lambda chosen: data[chosen])
    assert engine.follows_owners


def test_lists_of_records_agree_with_batches_of_one() -> None:
    """A collate function that returns the list of its records, as detection models have it."""
    torch.manual_seed(0)
    module = Loop("iteration")
    data = [{"x": _features(3 + i, 3, seed=i), "y": torch.tensor(float(i))} for i in range(4)]

    def loss(batch: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([(module.one(one["x"]).mean() - one["y"]).square() for one in batch])

    assert assert_agrees(module, loss, lambda chosen: [data[i] for i in chosen]).follows_owners


WAYS = ["gcn", "edges", "attention", "reduce", "sum of scatter", "self loops"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["mapping", "object", "slots"])
@pytest.mark.one_in(2)
def test_graphs_of_unequal_size_agree_with_batches_of_one(how: str, kind: str) -> None:
    torch.manual_seed(0)
    module, data = GCN(how), [_graph(seed) for seed in range(4)]

    def batch_of(chosen: list[int]) -> Any:
        batch = _collate_graphs([data[i] for i in chosen])
        return {"object": Graphs, "slots": SlottedGraphs, "mapping": dict}[kind](**batch)

    module.of_edges.requires_grad_(how == "edges")
    module.att.requires_grad_(how == "attention")
    assert assert_agrees(module, module, batch_of).follows_owners


@pytest.mark.parametrize("options", [{"memory": "lean"}, {"grad_sample": "materialize"}], ids=str)
def test_graphs_agree_in_every_memory_setting(options: dict[str, str]) -> None:
    torch.manual_seed(0)
    module, data = GCN("gcn"), [_graph(seed) for seed in range(4)]
    module.of_edges.requires_grad_(False)
    module.att.requires_grad_(False)
    assert_agrees(module, module, lambda chosen: _collate_graphs([data[i] for i in chosen]), **options)


class DeepSet(nn.Module):
    """Every element of a set by itself, then the mean over the set."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 1)
        self.double()

    def forward(self, rows: Tensor, index: Tensor, num: int) -> Tensor:
        inner = self.inner(rows)
        return self.outer(inner.new_zeros(num, 4).index_add_(0, index, inner)).squeeze(1).square()


@pytest.mark.parametrize("where", ["batch", "by name", "module", "method"])
def test_sample_of_row_gives_the_owners_of_sets(where: str) -> None:
    torch.manual_seed(0)
    module, sets = DeepSet(), [_features(2 + 3 * i, 2, seed=i) for i in range(4)]

    def batch_of(chosen: list[int]) -> dict[str, Any]:
        index = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(sets[i]) for i in chosen]))
        batch: dict[str, Any] = {"rows": torch.cat([sets[i] for i in chosen]), "members": index, "num": len(chosen)}
        if where == "batch":
            batch["sample_of_row"] = index
        elif where == "by name":
            batch["sample_of_row"] = {"rows": index}
        elif where == "module":
            module.sample_of_row = index
        return batch

    if where == "method":
        module.sample_of_row = lambda batch: batch["members"]  # type: ignore[assignment]

    def loss(batch: dict[str, Any]) -> Tensor:
        return module(batch["rows"], batch["members"], batch["num"])

    assert assert_agrees(module, loss, batch_of).follows_owners


@pytest.mark.parametrize("named_by", ["lengths", "list of lengths", "ends", "samples", "column", "column of floats"])
def test_whole_numbers_of_a_batch_name_the_owners(named_by: str) -> None:
    torch.manual_seed(0)
    module, sets = DeepSet(), [_features(1 + (5 * i) % 7, 2, seed=i) for i in range(4)]

    def batch_of(chosen: list[int]) -> tuple[Any, ...]:
        lengths = torch.tensor([len(sets[i]) for i in chosen])
        numbers = {
            "lengths": lengths,
            "list of lengths": lengths.tolist(),
            "ends": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            "samples": (index := torch.arange(len(chosen)).repeat_interleave(lengths)),
            "column": torch.stack([index, index * 0 + 7], 1),  # as of voxels
            "column of floats": torch.stack([index.float(), torch.rand(len(index))], 1),  # as of boxes
        }
        return torch.cat([sets[i] for i in chosen]), numbers[named_by], lengths.tolist, torch.zeros(len(chosen))

    def loss(batch: tuple[Any, ...]) -> Tensor:
        lengths = batch[2]()
        index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return module(batch[0], index, len(lengths))

    engine = assert_agrees(module, loss, batch_of)
    assert engine.follows_owners
    if named_by == "samples":  # the last record may have no rows
        two = batch_of([0, 1])
        record(engine, lambda batch: module(batch[0], batch[1], 3), (*two[:3], torch.zeros(3)), 3)
        assert [bool(row) for row in engine.squared_norms([["inner.0.weight"]])[0]] == [True, True, False]
        engine.end()


def test_numbers_that_add_up_by_chance_name_no_owners() -> None:
    """Two runs agree that labels are lengths, further records show that they are not."""

    def batch_of(lengths: list[int], labels: list[int]) -> tuple[Tensor, Tensor]:
        return _features(sum(lengths), 2), torch.tensor(labels)

    owners = BatchOwners(DeepSet())
    for size in (2, 3):
        owners.learn(batch_of([3, 2, 3][:size], [3, 2, 3][:size]), size)
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    batch = batch_of([4, 2], [3, 2])
    owners.note(batch, follower)
    assert isinstance(follower.owners_of(batch[0]), Mixed)


def test_declared_owners_may_be_left_out_at_times() -> None:
    def batch_of(*lengths: int) -> dict[str, Tensor]:
        index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return {"rows": _features(sum(lengths), 2), "sample_of_row": index}

    owners = BatchOwners(DeepSet())
    owners.learn(batch_of(1, 1), 2)
    owners.learn(batch_of(1, 1, 1), 3)
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    owners.note({"rows": _features(2, 2)}, follower)
    batch = batch_of(3, 1)
    owners.note(batch, follower)
    found = follower.owners_of(batch["rows"])
    assert isinstance(found, Rows)
    assert found.index.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("width", [4, 5])
def test_a_normalised_weight_may_be_as_wide_as_the_batch(width: int) -> None:
    """Its norm is repeated along its width, which is no repetition for each sample."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, width, dtype=torch.float64))
    module, sets = nn.ParameterList([weight]), [_features(2 + 3 * i, width, seed=i) for i in range(4)]

    def batch_of(chosen: list[int]) -> dict[str, Any]:
        index = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(sets[i]) for i in chosen]))
        return {"rows": torch.cat([sets[i] for i in chosen]), "sample_of_row": index, "num": len(chosen)}

    def loss(batch: dict[str, Any]) -> Tensor:
        rows = F.linear(batch["rows"], F.normalize(weight, dim=-1)).tanh().sum(1)
        return rows.new_zeros(batch["num"]).index_add_(0, batch["sample_of_row"], rows).square()

    assert assert_agrees(module, loss, batch_of).follows_owners


def test_instances_of_bags_agree_with_batches_of_one() -> None:
    """Multiple instances: images of a bag through a convolution, attention pooling within the bag by ``split``."""
    torch.manual_seed(0)
    conv, score, head = nn.Conv2d(1, 2, 3), nn.Linear(8, 1), nn.Linear(8, 1)
    module = nn.ModuleDict({"conv": conv, "norm": nn.GroupNorm(1, 2), "score": score, "head": head}).double()
    bags = [_features(1 + 2 * i, 1, 4, 4, seed=i) for i in range(4)]

    def loss(batch: list[Tensor]) -> Tensor:
        lengths = [len(bag) for bag in batch]
        hidden = module["norm"](module["conv"](torch.cat(batch))).flatten(1).tanh()
        pooled = [(module["score"](bag).softmax(0) * bag).sum(0) for bag in hidden.split(lengths)]
        return module["head"](torch.stack(pooled)).squeeze(1).square()

    assert assert_agrees(module, loss, lambda chosen: [bags[i] for i in chosen]).follows_owners


@each(
    "column, expected",
    [
        ([0, 0, 1, 2, 2, 3, 4, 4], True),
        ([1, 1, 3, 3], True),  # every other record has no row
        ([1, 1, 3, 3, 3], False),
        ([1, 1, 4, 4], False),
        ([3, 3, 1, 1], False),
        ([0.5, 1.0, 2.0, 3.0], False),
        ([1.0, 1.0, 3.0, float("inf")], False),
    ],
)
def test_a_column_that_names_samples_shows_two_records_in_turn(column: list[Any], expected: bool) -> None:
    table = torch.stack([torch.tensor(column), torch.rand(len(column))], 1)
    found = counted([((), table)], 5, Memo(), learns=True)
    assert [rows.index.tolist() for rows in found.values()] == ([column] if expected else [])
