"""Owners of rows over many steps: each step of one engine against batches of one, where sizes tell nothing apart.

A batch of four records has four nodes, four edges and four columns, and owners that differ. A later step may take other
rows, another order, another branch or another number of records than all steps before it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine
from tests.per_sample.owners import make, record

SWAP = 10
"""Step from which on some modules call two operations of equal shapes in the other order."""

COUNTS = [(1, 2), (2, 1), (1, 0), (0, 1)]
"""Number of nodes and edges of each record: four of each in a batch of these four."""

BATCHES = ["0123", "3210", "1", "1032", "-", "013", "2301", "10", "0", "0312", "3210", "-", "0123", "1", "1320"]
"""Records of each step."""


def batch_of(chosen: list[int], seed: int) -> dict[str, Tensor]:
    """Return a batch of records whose values follow from the seed of a step."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("x", "edge", "of_node", "of_edge", "y")}
    start = 0
    for position, number in enumerate(chosen):
        nodes, edges = COUNTS[number]
        generator = torch.Generator().manual_seed(100 * seed + number)
        parts["x"].append(torch.randn(nodes, 4, generator=generator))
        parts["edge"].append(torch.randn(edges, 4, generator=generator))
        parts["of_node"].append(torch.full((nodes,), position))
        parts["of_edge"].append(torch.full((edges,), position))
        parts["y"].append(torch.randn(1, 4, generator=generator))
        start += nodes
    empty = {"x": torch.zeros(0, 4), "edge": torch.zeros(0, 4), "y": torch.zeros(0, 4)}
    parts["to"] = parts["of_edge"]
    return {name: torch.cat(of) if of else empty.get(name, torch.zeros(0).long()) for name, of in parts.items()}


class Net(nn.Module):
    """Sums of rows of nodes and edges per record, in an order that a step chooses."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.step = how, 0
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.bias, self.gain = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def sample_of_row(self, batch: Any) -> dict[str, Tensor]:
        return {"x": batch["of_node"], "edge": batch["of_edge"], "to": batch["of_edge"]}

    def forward(self, batch: Any) -> Tensor:
        nodes, edges = (batch["x"], batch["of_node"]), (batch["edge"], batch["of_edge"])
        is_odd, is_late = self.step % 2 == 1, self.step >= SWAP
        if self.how == "arguments" and is_late:
            nodes, edges = edges, nodes
        (x, of_x), (z, of_z) = nodes, edges
        total = x.new_zeros(len(batch["y"]), 4)
        if self.how == "order" and is_odd:
            z, x = self.second(z) * self.gain, self.first(x) + self.bias
        else:
            x, z = self.first(x) + self.bias, self.second(z) * self.gain
        if self.how == "branch":
            x, z = (x.t().relu().t(), z) if is_odd else (x.tanh(), z.mT.exp().mT)
        if self.how == "rows":  # in two orders at once
            orders = [torch.arange(len(x)), torch.arange(len(x) - 1, -1, -1)]
            one, other = reversed(orders) if is_late else orders
            total = total.index_add(0, of_x[one], x[one]).index_add(0, of_x[other], x.index_select(0, other).exp())
        if self.how == "joined":
            parts = [[x, z], [z, x]], [[of_x, of_z], [of_z, of_x]]
            for rows, owner in [*zip(*parts, strict=True)][:: -1 if is_late else 1]:
                total = total.tanh().index_add(0, torch.cat(owner), torch.cat(rows))
        first, second = (z, of_z), (x, of_x)
        if self.how == "sums" and is_late:
            first, second = second, first
        for rows, owner in (first, second):
            total = total.index_add(0, owner, self.second(rows) if self.how == "sums" else rows)
        picked = total[of_x] * x
        if self.how == "in place":
            kept = torch.zeros_like(total)
            other = torch.zeros_like(total) if is_late else kept
            kept = other.scatter_add_(0, of_x.view(-1, 1).expand_as(picked), picked)
        else:
            kept = torch.zeros_like(total).index_add_(0, of_x, picked)
        return (self.head(total + kept) - batch["y"]).square().sum(1)


HOWS = ["arguments", "order", "branch", "rows", "joined", "sums", "in place"]


@pytest.mark.parametrize("how", HOWS)
def test_every_step_agrees_where_all_sizes_are_four(how: str) -> None:
    torch.manual_seed(0)
    module = Net(how)
    engine = make(module, module, lambda chosen: batch_of(chosen, 0))
    assert engine.follows_owners
    for step, records in enumerate(BATCHES):
        module.step = step
        _assert_step_agrees(engine, module, [int(one) for one in records.strip("-")], step)


def _assert_step_agrees(engine: PerSampleEngine, module: nn.Module, records: list[int], step: int) -> None:
    expected = [_alone(module, batch_of([number], step)) for number in records]
    try:
        record(engine, module, batch_of(records, step), len(records))
        grads = engine.per_sample_gradients()
    finally:
        engine.end()
    for name, parameter in module.named_parameters():
        true = torch.stack([one[name] for one in expected]) if records else parameter.new_zeros(0, *parameter.shape)
        torch.testing.assert_close(grads.get(name, torch.zeros_like(true)), true, rtol=1e-5, atol=1e-5)


def _alone(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    module(batch).sum().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return grads


class Pooled(nn.Module):
    """Sums the rows of each record into zeros, or into zeros that are made from the records, before a layer."""

    def __init__(self, *, of_records: bool) -> None:
        super().__init__()
        self.first, self.of_records = nn.Linear(4, 4), of_records

    def sample_of_row(self, batch: Any) -> dict[str, Tensor]:
        return {"x": batch["of_node"], "edge": batch["of_edge"]}

    def forward(self, batch: Any) -> Tensor:
        start = 0 * batch["y"] if self.of_records else torch.zeros_like(batch["y"])
        return (self.first(start.index_add(0, batch["of_node"], batch["x"])) - batch["y"]).square().sum(1)


@pytest.mark.parametrize("of_records", [False, True])
def test_sums_of_as_many_rows_as_records_need_owners(of_records: bool) -> None:
    """Where the last record has no rows, the position of its sum could belong to the owner of the row there."""
    torch.manual_seed(0)
    module = Pooled(of_records=of_records)
    engine = make(module, module, lambda chosen: batch_of(chosen, 0))
    refused = pytest.raises(PrivacyError, match=r"as in 0 \* targets in place of zeros")
    with nullcontext() if of_records else refused:
        for step, records in enumerate(BATCHES):
            _assert_step_agrees(engine, module, [int(one) for one in records.strip("-")], step)


class Scale(nn.Module):
    """A layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Few(nn.Module):
    """A row for each record, though in some batches only one record has edges."""

    def __init__(self, how: str, *, by_rule: bool) -> None:
        super().__init__()
        self.how, self.first = how, nn.Linear(4, 4)
        self.head = nn.Linear(4, 4) if by_rule else Scale()

    def sample_of_row(self, batch: Any) -> dict[str, Tensor]:
        return {"x": batch["of_node"], "edge": batch["of_edge"], "to": batch["of_edge"]}

    def forward(self, batch: Any) -> Tensor:
        made, total = self.first(batch["edge"]), torch.zeros_like(batch["y"])
        if self.how == "sums":
            total.index_add_(0, batch["of_edge"], made)
        elif self.how == "padded":
            total = torch.cat([made, total])[: len(total)]
        else:
            for row, record in enumerate(batch["of_edge"].tolist()):
                total[record] = made[row]
        return (self.head(total) - batch["y"]).square().sum(1)


@pytest.mark.parametrize("by_rule", [True, False])
@pytest.mark.parametrize("how", ["sums", "padded", "written"])
def test_rows_without_data_are_not_of_the_only_record(how: str, by_rule: bool) -> None:
    torch.manual_seed(0)
    module = Few(how, by_rule=by_rule)
    engine = make(module, module, lambda chosen: batch_of(chosen, 0))
    if how == "sums":
        _assert_step_agrees(engine, module, [2, 3], 1)
    else:
        with pytest.raises(PrivacyError, match="no sample's data are in, such as padding, noise or fakes"):
            _assert_step_agrees(engine, module, [2, 3], 1)


class Tokens(nn.Module):
    """Each record has a learned token before its rows, and a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places, self.edges = nn.Parameter(torch.randn(4)), nn.Embedding(3, 4), nn.Linear(4, 4)
        self.register_buffer("numbers", torch.arange(3)[None])

    sample_of_row = Few.sample_of_row

    def forward(self, batch: Any) -> Tensor:
        y = batch["y"]
        rows = torch.cat([self.token.expand(len(y), 1, -1), y[:, None].expand(-1, 2, -1)], 1)
        total = torch.zeros_like(y).index_add(0, batch["of_edge"], self.edges(batch["edge"]))
        return ((rows + self.places(self.numbers)).square().sum(1) - total).square().sum(1)


@pytest.mark.parametrize("records", [[1], [3], [1, 3], [0, 1, 3]])
def test_a_batch_of_one_record_is_followed_as_others_are(records: list[int]) -> None:
    torch.manual_seed(0)
    module = Tokens()
    engine = make(module, module, lambda chosen: batch_of(chosen, 0))
    assert engine.follows_owners
    _assert_step_agrees(engine, module, records, 1)


class Mixing(nn.Module):
    """A layer between two steps over rows that belong to one record each, until a later step mixes them."""

    def __init__(self, mix: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.step, self.mix = nn.Linear(4, 4), nn.Linear(4, 4), 0, mix

    def sample_of_row(self, batch: Any) -> dict[str, Tensor]:
        return {"x": batch["of_node"], "edge": batch["of_edge"], "to": batch["of_edge"]}

    def forward(self, batch: Any) -> Tensor:
        x = self.first(batch["x"])
        x = self.mix(x, batch) if self.step >= SWAP else x.tanh()
        total = torch.zeros_like(batch["y"]).index_add_(0, batch["of_node"], self.head(x))
        return (total - batch["y"]).square().sum(1)


def _written(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    kept = torch.zeros_like(x)
    seen = kept[:]
    kept.scatter_add_(0, batch["to"].view(-1, 1).expand_as(x), batch["edge"])
    return x + seen


MIXES: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "transposed": lambda x, batch: x.t(),
    "rows of edges": lambda x, batch: x + batch["edge"],
    "sums by another index": lambda x, batch: torch.zeros_like(x).index_add_(0, batch["to"], x),
    "selected, then added": lambda x, batch: x + x[torch.tensor([1, 2, 3, 0])],
    "another index joined": lambda x, batch: x + torch.cat([x[1:], x[:1]]),
    "a view of what was written": _written,
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_later_step_that_mixes_records_is_refused(mix: str) -> None:
    torch.manual_seed(0)
    module = Mixing(MIXES[mix])
    engine = make(module, module, lambda chosen: batch_of(chosen, 0))
    for module.step in range(SWAP + 1):
        engine.begin(4)
        batch = batch_of([0, 1, 2, 3], module.step)
        engine.see(batch)
        if module.step < SWAP:
            module(batch).sum().backward()
        else:
            with pytest.raises(PrivacyError, match=r"rows of known samples|keep the samples apart"):
                module(batch)
        engine.end()
