"""Networks and batches whose rows belong to samples by an index, and the comparison with batches of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.per_sample import PerSampleEngine
from lightning_dp.per_sample._torch import real_view

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
            expected[name].append(real_view(torch.zeros_like(module.get_parameter(name)) if grad is None else grad))
    module.zero_grad()
    scale = 1.0 + max(float(grad.abs().max()) for grads in expected.values() for grad in grads)
    for order in ("norms first", "gradients first"):
        record(engine, loss, batch_of(list(range(size))), size)
        assert all(p.grad is None for p in module.parameters() if p.requires_grad)
        grads = engine.per_sample_gradients() if order == "gradients first" else {}
        norms = engine.squared_norms([names, *[[name] for name in names]])
        factors = torch.linspace(0.5, 1.5, size, dtype=norms.dtype)
        factors[1:2] = 0.0
        out = {name: torch.zeros_like(real_view(module.get_parameter(name).detach())) for name in names}
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
