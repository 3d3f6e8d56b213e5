"""Rows that belong to samples by an index: rows that values choose, trained states, and their clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.per_sample import PerSampleEngine, register_rule
from tests import reference
from tests.per_sample.checks import assert_close
from tests.per_sample.owners import GCN, _collate_graphs, _features, _graph, assert_agrees, make, record
from tests.per_sample.rule_cases import CASES, Arranged
from tests.per_sample.test_rounding import CLIPPINGS, added
from tests.per_sample.test_rounding import record as cancelling


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
