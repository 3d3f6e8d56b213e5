"""Graphs with several kinds of nodes and edges, each kind in a part of the batch of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.per_sample.owners import assert_agrees
from tests.per_sample.test_owned_training import fit

TO, BACK = ("author", "writes", "paper"), ("paper", "is by", "author")


class Kinds:
    """Graphs by kind, as graph libraries have them: asked for a kind that it lacks, it makes an empty one."""

    def __init__(self, **shared: Tensor) -> None:
        self.shared: dict[str, Tensor] = shared
        self.parts: dict[Any, dict[str, Tensor]] = {}

    @property
    def node_types(self) -> list[str]:
        return [kind for kind in self.parts if isinstance(kind, str)]

    def keys(self) -> list[str]:
        return [*self.shared, *{name for part in self.parts.values() for name in part}]

    def __getitem__(self, kind: Any) -> Any:
        return self.shared[kind] if kind in self.shared else self.parts.setdefault(kind, {})

    def to_dict(self) -> dict[Any, Any]:
        return {"shared": dict(self.shared), **{kind: dict(part) for kind, part in self.parts.items()}}


def _graph(seed: int) -> Kinds:
    generator = torch.Generator().manual_seed(seed)
    authors, papers, edges = 2 + seed % 3, 3 + seed % 2, 4 + seed % 5
    graph = Kinds(y=torch.randn(1, dtype=torch.float64, generator=generator))
    graph["author"]["x"] = torch.randn(authors, 3, dtype=torch.float64, generator=generator)
    graph["paper"]["x"] = torch.randn(papers, 2, dtype=torch.float64, generator=generator)
    pairs = [torch.randint(most, (edges,), generator=generator) for most in (authors, papers)]
    graph[TO]["edge_index"] = torch.stack(pairs)
    graph[TO]["edge_attr"] = torch.randn(edges, 2, dtype=torch.float64, generator=generator)
    graph[BACK]["edge_index"] = torch.stack(pairs[::-1])
    return graph


def _collate(graphs: list[Kinds]) -> Kinds:
    batch, firsts = Kinds(y=torch.cat([graph["y"] for graph in graphs])), {}
    for kind in ("author", "paper"):
        counts = torch.tensor([len(graph[kind]["x"]) for graph in graphs])
        firsts[kind] = counts.cumsum(0) - counts
        batch[kind]["x"] = torch.cat([graph[kind]["x"] for graph in graphs])
        batch[kind]["batch"] = torch.arange(len(graphs)).repeat_interleave(counts)
        batch[kind]["ptr"] = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    for kind in (TO, BACK):
        shifts = torch.stack([firsts[kind[0]], firsts[kind[2]]])
        moved = [graph[kind]["edge_index"] + shifts[:, [at]] for at, graph in enumerate(graphs)]
        batch[kind]["edge_index"] = torch.cat(moved, 1)
    batch[TO]["edge_attr"] = torch.cat([graph[TO]["edge_attr"] for graph in graphs])
    return batch


class Passing(nn.Module):
    """Messages from authors to papers, weighted by edges, and back; a mean over each kind of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.author, self.paper, self.edge = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(2, 4)
        self.back, self.head = nn.Linear(4, 4), nn.Linear(8, 1)
        self.double()

    def forward(self, batch: Kinds) -> Tensor:
        author, paper = self.author(batch["author"]["x"]), self.paper(batch["paper"]["x"])
        source, target = batch[TO]["edge_index"]
        messages = author[source] * self.edge(batch[TO]["edge_attr"]).sigmoid()
        paper = (paper + torch.zeros_like(paper).index_add(0, target, messages)).relu()
        source, target = batch[BACK]["edge_index"]
        author = (author + torch.zeros_like(author).index_add(0, target, self.back(paper)[source])).relu()
        pooled = [_mean(rows, batch[kind]["batch"]) for kind, rows in (("author", author), ("paper", paper))]
        return (self.head(torch.cat(pooled, 1)).squeeze(1) - batch["y"]).square()


def _mean(rows: Tensor, owner: Tensor) -> Tensor:
    num = int(owner.max()) + 1
    total = rows.new_zeros(num, rows.shape[1]).index_add_(0, owner, rows)
    return total / torch.bincount(owner, minlength=num)[:, None]


@pytest.mark.parametrize("seeds", [[1, 2, 3, 4], [4, 5, 1, 2]], ids=["unequal", "as many of both"])
def test_kinds_of_nodes_agree_with_batches_of_one(seeds: list[int]) -> None:
    torch.manual_seed(0)
    module, data = Passing(), [_graph(seed) for seed in seeds]
    assert assert_agrees(module, module, lambda chosen: _collate([data[i] for i in chosen])).follows_owners


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kinds_of_nodes_train_and_stay_as_they_are() -> None:
    torch.manual_seed(0)
    seen: list[list[Any]] = []

    class Looks(Passing):
        def forward(self, batch: Kinds) -> Tensor:
            seen.append([*batch.parts])
            return super().forward(batch)

    data = [_graph(seed) for seed in range(12)]
    assert fit(Looks(), data, _collate, grad_sample="rules").ledger.num_steps == 3
    assert all(kinds == ["author", "paper", TO, BACK] for kinds in seen)
    assert all([*graph.parts] == ["author", "paper", TO, BACK] for graph in data)
