"""Rows that belong to samples by an index: graphs, sets, packed sequences, and loops over samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine, register_rule
from lightning_dp.per_sample.batch_owners import BatchOwners
from lightning_dp.per_sample.following import Follower
from lightning_dp.per_sample.owned import Mixed, Rows
from lightning_dp.per_sample.tracker import Tracker
from lightning_dp.per_sample.uses import Recorder
from tests import reference
from tests.per_sample.checks import assert_close
from tests.per_sample.rule_cases import CASES, Arranged
from tests.per_sample.test_rounding import CLIPPINGS, added
from tests.per_sample.test_rounding import record as cancelling

Loss = Callable[[Any], Tensor]


def make(module: nn.Module, loss: Loss, batch_of: Callable[[list[int]], Any], **options: Any) -> PerSampleEngine:
    """An engine that has learned from the first two records, as a trial does."""
    engine = PerSampleEngine(module, **options)
    engine.attach()
    engine.set_parameters({name: p for name, p in module.named_parameters() if p.requires_grad})

    def run(size: int) -> None:
        batch = batch_of(([0, 1] * size)[:size])
        engine.see(batch)
        loss(batch).sum().backward()

    engine.learn_layout(run)
    module.zero_grad()
    return engine


def record(engine: PerSampleEngine, loss: Loss, batch: Any, size: int) -> None:
    engine.begin(size)
    engine.see(batch)
    loss(batch).sum().backward()
    engine.check_tracked()


def assert_agrees(
    module: nn.Module,
    loss: Loss,
    batch_of: Callable[[list[int]], Any],
    size: int = 4,
    rtol: float = 1e-9,
    **options: Any,
) -> PerSampleEngine:
    """Gradients, norms and weighted sums equal those of batches of one; the losses are one for each sample."""
    engine = make(module, loss, batch_of, **options)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    expected: dict[str, list[Tensor]] = {name: [] for name in names}
    for sample in range(size):
        module.zero_grad()
        loss(batch_of([sample])).sum().backward()
        for name in names:
            grad = module.get_parameter(name).grad
            expected[name].append(torch.zeros_like(module.get_parameter(name)) if grad is None else grad)
    module.zero_grad()
    scale = 1.0 + max(float(grad.abs().max()) for grads in expected.values() for grad in grads)
    for order in ("norms first", "gradients first"):
        record(engine, loss, batch_of(list(range(size))), size)
        assert all(p.grad is None for p in module.parameters() if p.requires_grad)
        grads = engine.per_sample_gradients() if order == "gradients first" else {}
        norms = engine.squared_norms([names, *[[name] for name in names]])
        factors = torch.linspace(0.5, 1.5, size, dtype=norms.dtype)
        factors[1:2] = 0.0
        out = {name: torch.zeros_like(module.get_parameter(name)) for name in names}
        engine.accumulate(factors[None], [names], out)
        grads = grads or engine.per_sample_gradients()
        engine.end()
        for row, name in enumerate(names):
            true = torch.stack(expected[name])
            torch.testing.assert_close(grads[name], true, rtol=0, atol=rtol * scale)
            torch.testing.assert_close(out[name], torch.tensordot(factors, true, 1), rtol=0, atol=rtol * scale * size)
            squares = true.reshape(size, -1).square().sum(1)
            torch.testing.assert_close(norms[row + 1], squares, rtol=0, atol=rtol * scale**2 * true[0].numel())
    return engine


def _features(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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


# ---------------------------------------------------------------- graphs, sets


class Graphs:
    """A batch of graphs as graph libraries have it: attributes and keys."""

    def __init__(self, **tensors: Any) -> None:
        self.__dict__.update(tensors)

    def keys(self) -> list[str]:
        return list(self.__dict__)

    def __getitem__(self, key: str) -> Any:
        return self.__dict__[key]


@dataclass(slots=True)
class SlottedGraphs:
    """A batch of graphs without a dictionary of attributes."""

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    y: Tensor
    batch: Tensor
    ptr: Tensor

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


def _graph(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    nodes = 3 + 2 * seed
    edges = torch.randint(nodes, (2, 4 + 3 * seed), generator=generator)
    return {
        "x": _features(nodes, 3, seed=seed),
        "edge_index": edges,
        "edge_attr": _features(edges.shape[1], 2, seed=10 + seed),
        "y": _features(1, seed=20 + seed),
    }


def _collate_graphs(graphs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    counts = torch.tensor([len(graph["x"]) for graph in graphs])
    firsts = counts.cumsum(0) - counts
    return {
        "x": torch.cat([graph["x"] for graph in graphs]),
        "edge_index": torch.cat([g["edge_index"] + int(first) for g, first in zip(graphs, firsts, strict=True)], 1),
        "edge_attr": torch.cat([graph["edge_attr"] for graph in graphs]),
        "y": torch.cat([graph["y"] for graph in graphs]),
        "batch": torch.arange(len(graphs)).repeat_interleave(counts),
        "ptr": torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
    }


class GCN(nn.Module):
    """Message passing of several kinds, mean pooling, a head: written as graph libraries write it."""

    def __init__(self, how: str = "gcn") -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(3, 5, bias=False), nn.Linear(5, 5)
        self.of_edges = nn.Linear(2, 5)
        self.bias, self.att = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(1, 5))
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 1)
        self.double()

    def passed(self, x: Tensor, edges: Tensor, values: Tensor | None = None) -> Tensor:
        source, target = edges
        messages = x.index_select(0, source)
        if self.how == "gcn":
            degree = x.new_zeros(len(x)).scatter_add_(0, target, torch.ones(len(target), dtype=x.dtype))
            scale = degree.clamp_min(1).pow(-0.5)
            messages = messages * (scale[source] * scale[target]).unsqueeze(-1)
        elif self.how == "edges":
            messages = (messages + self.of_edges(values)).relu()
        elif self.how == "attention":
            score = ((messages + x[target]).tanh() * self.att).sum(-1)
            top = score.new_full((len(x),), -torch.inf).scatter_reduce(0, target, score.detach(), "amax")
            weight = (score - top[target]).exp()
            total = x.new_zeros(len(x)).index_add_(0, target, weight)
            messages = messages * (weight / (total[target] + 1e-9)).unsqueeze(-1)
        if self.how == "reduce":
            index = target.unsqueeze(1).expand_as(messages)
            return torch.zeros_like(x).scatter_reduce(0, index, messages, "amax", include_self=False)
        if self.how == "sum of scatter":
            return x.new_zeros(x.shape).scatter_add_(0, target.view(-1, 1).expand_as(messages), messages)
        return x.new_zeros(x.shape).index_add(0, target, messages)

    def forward(self, graphs: Any) -> Tensor:
        x, edges, owner = graphs["x"], graphs["edge_index"], graphs["batch"]
        if self.how == "self loops":
            loops = torch.arange(len(x)).unsqueeze(0).repeat(2, 1)
            edges = torch.cat([edges, loops], 1)
        x = self.passed(self.first(x), edges, graphs["edge_attr"]) + self.bias
        x = self.norm(self.passed(self.second(x.relu()), edges, graphs["edge_attr"]))
        num = int(owner.max()) + 1
        total = x.new_zeros(num, 5).index_add_(0, owner, x)
        counts = x.new_zeros(num).index_add_(0, owner, x.new_ones(len(x)))
        return (self.head(total / counts[:, None]).squeeze(1) - graphs["y"]).square()


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


@pytest.mark.parametrize("named_by", ["lengths", "list of lengths", "ends", "samples"])
def test_whole_numbers_of_a_batch_name_the_owners(named_by: str) -> None:
    torch.manual_seed(0)
    module, sets = DeepSet(), [_features(1 + (5 * i) % 7, 2, seed=i) for i in range(4)]

    def batch_of(chosen: list[int]) -> tuple[Any, ...]:
        lengths = torch.tensor([len(sets[i]) for i in chosen])
        numbers = {
            "lengths": lengths,
            "list of lengths": lengths.tolist(),
            "ends": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            "samples": torch.arange(len(chosen)).repeat_interleave(lengths),
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


# ---------------------------------------------------------------- packed sequences


@pytest.mark.parametrize("kind", ["lstm", "gru", "layer", "packed in forward"])
def test_packed_sequences_agree_with_batches_of_one(kind: str) -> None:
    torch.manual_seed(0)
    sequences = [_features(2 + (3 * i) % 5, 3, seed=i) for i in range(4)]
    inner: Any = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.LSTM)(3, 4, batch_first=True)
    module = nn.ModuleDict({"first": nn.Linear(3, 3), "inner": inner, "head": nn.Linear(4, 1)}).double()
    if kind == "layer":
        module.pop("inner")
        module["inner"] = nn.Linear(3, 4).double()

    def batch_of(chosen: list[int]) -> Any:
        picked = [sequences[i] for i in chosen]
        if kind == "packed in forward":
            return {"x": pad_sequence(picked, batch_first=True), "n": torch.tensor([len(one) for one in picked])}
        return pack_sequence(picked, enforce_sorted=False)

    def loss(batch: Any) -> Tensor:
        if kind == "packed in forward":
            batch = pack_padded_sequence(batch["x"], batch["n"], batch_first=True, enforce_sorted=False)
        given = batch._replace(data=module["first"](batch.data))
        if kind == "layer":
            hidden, lengths = pad_packed_sequence(given._replace(data=module["inner"](given.data)), batch_first=True)
            mask = torch.arange(hidden.shape[1]) < lengths[:, None]
            pooled = torch.where(mask[..., None], hidden, 0.0).sum(1)
        else:
            state = module["inner"](given)[1]
            pooled = (state[0] if isinstance(state, tuple) else state)[-1]
        return module["head"](pooled).squeeze(1).square()

    assert_agrees(module, loss, batch_of)


# ---------------------------------------------------------------- refusals


def test_graphs_that_were_dropped_are_refused() -> None:
    module, data = GCN("gcn"), [_graph(seed) for seed in range(4)]
    engine = make(module, module, lambda chosen: _collate_graphs([data[i] for i in chosen]))
    engine.begin(4)
    with pytest.raises(PrivacyError, match=r"batch of 4 graphs as drawn, got 3"):
        engine.see(_collate_graphs(data[:3]))
    engine.end()


@pytest.mark.parametrize(
    "index", [torch.tensor([0, 1, 4]), torch.tensor([-1, 0, 1]), torch.zeros(3), torch.zeros(3, 1, dtype=torch.long)]
)
def test_owners_that_name_no_sample_are_refused(index: Tensor) -> None:
    engine = PerSampleEngine(nn.Linear(2, 1))
    engine._rows._learning_size = 2
    with pytest.raises(PrivacyError, match="Expected sample_of_row to give each row one of 2 samples"):
        engine.see({"rows": torch.zeros(3, 2), "sample_of_row": index})


class Mixing(nn.Module):
    """Graphs whose nodes meet each other across samples before a layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(2, 1)
        self.double()

    def forward(self, rows: Tensor) -> Tensor:
        if self.how == "softmax":
            rows = rows.softmax(0)
        elif self.how == "sum":
            rows = rows.sum(0, keepdim=True).expand(len(rows), -1) + rows
        elif self.how == "products":
            rows = (rows @ rows.T) @ rows
        elif self.how == "shift":
            rows = rows + rows.roll(1, 0)
        elif self.how == "padding":
            rows = rows + F.pad(rows, (0, 0, 1, -1))
        elif self.how == "batch norm":
            rows = F.batch_norm(rows, None, None, training=True)
        elif self.how == "variance":
            rows = rows / rows.var(True)
        elif self.how == "counts":
            rows = rows * torch.repeat_interleave(rows.detach().abs().sum(1).long() + 1)[: len(rows), None]
        elif self.how == "view":
            kept = torch.zeros_like(rows)
            view = kept.view(-1)
            kept += rows
            rows = view.view(-1, 2)
        elif self.how == "numpy":
            rows = torch.from_numpy(rows.detach().numpy().copy())
        return self.layer(rows).squeeze(1)


@pytest.mark.parametrize(
    "how", ["softmax", "sum", "products", "shift", "padding", "batch norm", "variance", "counts", "view", "numpy"]
)
def test_rows_that_meet_across_samples_are_refused(how: str) -> None:
    module, sets = Mixing(how), [_features(2 + i, 2, seed=i) for i in range(3)]

    def batch_of(chosen: list[int]) -> dict[str, Tensor]:
        index = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(sets[i]) for i in chosen]))
        return {"rows": torch.cat([sets[i] for i in chosen]), "sample_of_row": index}

    with pytest.raises(PrivacyError, match=r"Nor can rows be followed.*meet rows of known samples"):
        make(module, lambda batch: module(batch["rows"]), batch_of)


def test_owners_are_not_carried_to_the_next_batch() -> None:
    """A tensor that the module keeps from one batch has no owners in the next one."""
    data = [_features(2 + i, 2, seed=i) for i in range(3)]
    module = nn.Linear(2, 1).double()
    kept = SimpleNamespace(rows=None)

    def loss(batch: list[Tensor]) -> Tensor:
        before, kept.rows = kept.rows, torch.cat(batch)
        return module(kept.rows if before is None or not kept.on else before).sum()

    kept.on = False
    engine = make(module, loss, lambda chosen: [data[i] for i in chosen])
    kept.on = True
    engine.begin(2)
    engine.see(data[:2])
    with pytest.raises(PrivacyError, match="meet rows of known samples"):
        loss(data[:2])
    engine.end()


class Joined(nn.Module):
    """Rows of all records joined, with nothing that says whose they are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(3, 1)
        self.double()

    def forward(self, rows: Tensor) -> Tensor:
        if self.how == "of the batch":  # (B, T, 3): how many rows a sample has follows from the batch
            return self.layer(rows.flatten(0, 1)).view(len(rows), -1).sum(1)
        return self.layer(rows).view(-1, 2).sum(1)


@pytest.mark.parametrize(
    ("how", "alike", "works"), [("joined", True, False), ("joined", False, True), ("of the batch", True, True)]
)
def test_rows_per_sample_may_change_only_if_they_are_known(how: str, alike: bool, works: bool) -> None:
    """Four records with 2, 4, 4 and 2 rows: divisible, and dealt to the wrong samples without a word."""
    module = Joined(how)
    engine = PerSampleEngine(module)
    engine.attach()
    engine.set_parameters(dict(module.named_parameters()))
    shape = (2, 3) if how == "of the batch" else (3,)

    def run(size: int) -> None:
        batch = _features(5, *shape)[:size] if how == "of the batch" else _features(20, 3)[: 2 * size]
        engine.see(batch)
        module(batch).sum().backward()

    engine.learn_layout(run, alike=alike)
    assert not engine.follows_owners
    engine.begin(4)
    batch = _features(4, 3, 3) if how == "of the batch" else _features(12, 3)
    engine.see(batch)
    if works:
        module(batch).sum().backward()
    else:
        with pytest.raises(PrivacyError, match=r"hold 2 row\(s\) for each of 4 samples, got length=12"):
            module(batch)
    engine.end()


class Kept(nn.Module):
    """A layer on the rows that a mask of the batch keeps, in several ways to write it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(3, 1)
        self.double()

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, mask = batch
        kept = mask.nonzero()[:, 0]
        if self.how == "mask":
            values = self.layer(rows[mask])
        elif self.how == "index":
            values = self.layer(rows.flatten(0, 1)[mask.flatten().nonzero()[:, 0]])
        elif self.how == "places":
            values = self.layer(rows[mask.nonzero(as_tuple=True)])
        else:
            values = self.layer(torch.cat([row[: int(num)] for row, num in zip(rows, mask.sum(1), strict=True)]))
        return torch.zeros(len(rows), 1, dtype=torch.float64).index_add(0, kept, values.tanh())


@pytest.mark.parametrize("how", ["mask", "index", "places", "slices"])
def test_rows_that_values_choose_are_followed(how: str) -> None:
    """All records seen while the layout is learned are whole; later 3 of 4 samples have 6 rows of 4, 1 and 1."""
    torch.manual_seed(0)
    module, rows = Kept(how), _features(4, 4, 3)
    mask = torch.ones(4, 4, dtype=torch.bool)
    engine = PerSampleEngine(module)
    engine.attach()
    engine.set_parameters(dict(module.named_parameters()))

    def run(batch: tuple[Tensor, Tensor]) -> None:
        engine.see(batch)
        module(batch).sum().backward()

    engine.learn_layout(lambda size: run((rows[:2].repeat(2, 1, 1)[:size], mask[:size])), (2, 3), alike=True)
    mask[1, 1:] = mask[2, 1:] = False
    batch = rows[:3], mask[:3]
    expected = reference.per_sample_gradients(
        module, lambda i: module((batch[0][i : i + 1], batch[1][i : i + 1])).sum(), 3
    )
    engine.begin(3)
    run(batch)
    engine.check_tracked()
    for name, grad in engine.per_sample_gradients().items():
        assert_close(grad, expected[name], float(expected[name].abs().max()), 1e-9, name)
    engine.end()


class Experts(nn.Module):
    """Each row goes through the expert of its sign; the results are added up in place, one expert after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), nn.Linear(3, 1)
        self.double()

    def forward(self, rows: Tensor) -> Tensor:
        result = torch.zeros_like(rows)
        for sign, expert in zip((1, -1), self.experts, strict=True):
            chosen = (rows[:, 0].sign() == sign).nonzero()[:, 0]
            result.index_add_(0, chosen, expert(rows[chosen]).tanh())
        return self.head(result)


@pytest.mark.parametrize("signs", [[-1, 1], [1, -1], [-1, 1, -1], [1]], ids=str)
def test_experts_of_one_row_each_are_followed(signs: list[int]) -> None:
    torch.manual_seed(0)
    module, rows = Experts(), _features(3, 3)
    rows[:, 0] = rows[:, 0].abs()
    engine = PerSampleEngine(module)
    engine.attach()
    engine.set_parameters(dict(module.named_parameters()))

    def run(batch: Tensor) -> None:
        engine.see(batch)
        module(batch).square().sum().backward()

    assert engine.prefer_owners()
    engine.learn_layout(lambda size: run(rows[[0, 1, 0][:size]]), (2, 3), alike=True)
    batch = rows[: len(signs)].clone()
    batch[:, 0] *= torch.tensor(signs)
    expected = reference.per_sample_gradients(module, lambda i: module(batch[i : i + 1]).square().sum(), len(signs))
    engine.begin(len(signs))
    run(batch)
    engine.check_tracked()
    for name, grad in engine.per_sample_gradients().items():
        assert_close(grad, expected[name], float(expected[name].abs().max()), 1e-9, name)
    engine.end()


class Started(nn.Module):
    """A recurrent layer from a trained state, then a loop over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.cell, self.layer = nn.Parameter(torch.randn(1, 1, 3)), nn.GRU(3, 3), nn.Linear(3, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.cell(x.transpose(0, 1), self.start.expand(1, len(x), 3).contiguous())[0]
        return torch.stack([self.layer(out[:, i]).sum() for i in range(len(x))])


@pytest.mark.parametrize("size", [1, 3])
def test_a_trained_state_agrees_in_every_size(size: int) -> None:
    torch.manual_seed(0)
    module, x = Started(), _features(4, 2, 3)
    assert assert_agrees(module, module, lambda chosen: x[chosen], size=size).follows_owners


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_bags_by_offsets_agree_with_batches_of_one(mode: str, padding_idx: int | None) -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(7, 4, mode=mode, padding_idx=padding_idx)
    module = nn.ModuleDict({"bag": bag, "head": nn.Linear(4, 1)}).double()
    bags = [torch.randint(7, (1 + i,), generator=torch.Generator().manual_seed(i)) for i in range(5)]

    def batch_of(chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.tensor([len(bags[i]) for i in chosen])
        return torch.cat([bags[i] for i in chosen]), lengths.cumsum(0) - lengths, _features(5, seed=3)[chosen]

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        text, offsets, labels = batch
        return (module["head"](module["bag"](text, offsets)).squeeze(1) - labels).square()

    assert assert_agrees(module, loss, batch_of).follows_owners


class Looped(nn.Module):
    """A case of the contract over rules, one sample at a time."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = Arranged(CASES[name], "positions")

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(row) for row in x.split(1)])


OWNED_CASES = [
    "linear, Gram matrices",
    "linear, products",
    "linear, cached",
    "embedding",
    "conv2d, grouped",
    "conv2d, Gram matrices",
    "layer norm",
    "group norm",
    "elementwise",
    "weight norm",
]


@pytest.mark.parametrize("name", OWNED_CASES)
def test_owned_rows_that_cancel_keep_to_the_bound(name: str) -> None:
    """The contract of ``test_rounding`` where rows belong to samples by an index."""
    torch.manual_seed(0)
    module = Looped(name)
    x, backprop = cancelling(module.inner, 1e9, 5, torch.float32)
    like = torch.rand_like(x) if x.is_floating_point() else torch.randint_like(x, 9)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]) * batch[1]).flatten(1).sum(1)

    engine = make(module, loss, lambda chosen: (like[chosen], backprop[chosen]))
    assert engine.follows_owners
    record(engine, loss, (x, backprop), 3)
    for clipping in CLIPPINGS:
        assert added(engine, module, clipping, {}) <= 1 + 1e-5, clipping
    engine.end()


def test_a_graph_that_is_not_finite_reaches_no_other() -> None:
    torch.manual_seed(0)
    module, data = GCN("gcn"), [_graph(seed) for seed in range(4)]
    for unused in (module.of_edges.weight, module.of_edges.bias, module.att):
        unused.requires_grad_(False)
    engine = make(module, module, lambda chosen: _collate_graphs([data[i] for i in chosen]))
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    sums = []
    for value in (0.0, torch.nan):
        batch = _collate_graphs(data)
        batch["x"] = torch.where(batch["batch"][:, None] == 1, value, batch["x"])
        record(engine, module, batch, 4)
        norms = engine.squared_norms([names])
        assert norms.isfinite()[0].tolist() == [True, value == 0.0, True, True]
        out = {name: torch.zeros_like(module.get_parameter(name)) for name in names}
        engine.accumulate(torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=norms.dtype), [names], out)
        sums.append(out)
        engine.end()
    for name in names:
        assert bool(sums[1][name].isfinite().all())
        torch.testing.assert_close(sums[0][name], sums[1][name], rtol=1e-12, atol=1e-12)


def test_graphs_of_one_user_count_as_one_sample() -> None:
    torch.manual_seed(0)
    module, data = GCN("gcn"), [_graph(seed) for seed in range(4)]
    for unused in (module.of_edges.weight, module.of_edges.bias, module.att):
        unused.requires_grad_(False)
    engine = make(module, module, lambda chosen: _collate_graphs([data[i] for i in chosen]))
    record(engine, module, _collate_graphs(data), 4)
    alone = engine.per_sample_gradients()
    engine.end()
    engine.begin(4, torch.tensor([0, 0, 0, 1]))
    batch = _collate_graphs(data)
    engine.see(batch)
    module(batch).sum().backward()
    names = list(alone)
    norms = engine.squared_norms([names])
    for name, grads in engine.per_sample_gradients().items():
        expected = torch.stack([alone[name][:3].sum(0), alone[name][3]])
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-10)
    total = torch.stack([torch.stack([g[:3].sum(0), g[3]]).flatten(1).square().sum(1) for g in alone.values()]).sum(0)
    torch.testing.assert_close(norms[0], total, rtol=1e-9, atol=1e-9)
    engine.end()


class _Scaled(torch.autograd.Function):
    """Multiplies rows by a gain, without a word to torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return x * gain

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gain = ctx.saved_tensors
        return grads[0] * gain, (grads[0] * x).sum(0)


def test_registered_rules_take_rows_of_unequal_number() -> None:
    torch.manual_seed(0)
    gain = nn.Parameter(torch.rand(3, dtype=torch.float64))
    module = nn.ModuleDict({"head": nn.Linear(3, 2)}).double()
    module.gain = gain
    bags = [_features(1 + 2 * i, 3, seed=i) for i in range(4)]

    def loss(batch: list[Tensor]) -> Tensor:
        rows = module["head"](_Scaled.apply(torch.cat(batch), gain))  # type: ignore[no-untyped-call]
        return torch.stack([bag.square().sum() for bag in rows.split([len(bag) for bag in batch])])

    remove = register_rule(
        _Scaled,
        lambda values, backprop: {"gain": backprop * values["x"]},
        arguments=("x", "gain"),
        parameters=("gain",),
    )
    try:
        assert assert_agrees(module, loss, lambda chosen: [bags[i] for i in chosen]).follows_owners
    finally:
        remove()
