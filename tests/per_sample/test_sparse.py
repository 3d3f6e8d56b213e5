"""Owners of sparse matrices: adjacencies of all graphs of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from tests.per_sample.owners import _collate_graphs, _graph, assert_agrees, make
from tests.per_sample.ways_of_use import Uses, drawn

Graphs = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (invariant|CSR)")


def coo(batch: Graphs) -> Tensor:
    """The adjacency of all graphs, with a weight for each edge."""
    weights, size = batch["x"][batch["edge_index"][0], 0].square(), len(batch["x"])
    return torch.sparse_coo_tensor(batch["edge_index"], weights, (size, size))


def csr(batch: Graphs) -> Tensor:
    """The same of ones, as a package makes it: from sorted edges and running sums of their numbers."""
    (first, second), size = batch["edge_index"], len(batch["x"])
    order = (first * size + second).sort()[1]
    ends = torch._convert_indices_from_coo_to_csr(first[order], size)
    return torch.sparse_csr_tensor(
        crow_indices=ends, col_indices=second[order], values=torch.ones(len(order)).double(), size=(size, size)
    )


def with_loops(batch: Graphs) -> Tensor:
    """A matrix of entries that are read from another one, and of ones at its diagonal."""
    matrix = csr(batch)
    rows = torch.arange(len(batch["x"])).repeat_interleave(matrix.crow_indices().diff())
    edges = torch.stack([rows, matrix.col_indices()])
    loops = torch.arange(len(batch["x"])).expand(2, -1)
    values = torch.cat([matrix.values(), torch.ones(len(batch["x"])).double()])
    return torch.sparse_coo_tensor(torch.cat([edges, loops], 1), values, matrix.shape).coalesce()


def messages(matrix: Tensor, rows: Tensor) -> Tensor:
    """The product of a matrix and rows by the places and values of its entries."""
    (first, second), values = matrix.indices(), matrix.values()
    return torch.zeros_like(rows).index_add(0, first, values[:, None] * rows[second])


def pooled(batch: Graphs, rows: Tensor) -> Tensor:
    """Rows that a sort finds, put back to where they were."""
    order, made = rows[:, 0].sort(descending=True)[1], torch.zeros_like(rows)
    made[order] = rows[order].tanh()
    return made


WAYS: dict[str, Callable[[Graphs, Tensor], Tensor]] = {
    "coo": lambda batch, rows: torch.sparse.mm(coo(batch), rows),
    "csr": lambda batch, rows: csr(batch) @ rows,
    "csc": lambda batch, rows: torch.sparse.mm(csr(batch).to_sparse_csc(), rows),
    "vector": lambda batch, rows: (coo(batch) @ rows[:, 0])[:, None] * rows,
    "transposed": lambda batch, rows: csr(batch).t() @ rows,
    "squared": lambda batch, rows: messages((csr(batch) @ csr(batch)).to_sparse_coo(), rows),
    "with its transpose": lambda batch, rows: (coo(batch) @ coo(batch).t()).to_dense().sum(1, keepdim=True) * rows,
    "with loops": lambda batch, rows: torch.sparse.mm(with_loops(batch), rows),
    "mean": lambda batch, rows: torch.sparse.mm(csr(batch), rows, "mean"),
}


class Net(nn.Module):
    """Two layers around messages along the edges of graphs, and a sum over their nodes."""

    def __init__(self, way: Callable[[Graphs, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Linear(3, 4).double(), nn.Linear(4, 1).double(), way

    def forward(self, batch: Graphs) -> Tensor:
        rows = self.last(self.way(batch, self.first(batch["x"]).tanh())).squeeze(1).square()
        size = int(batch["batch"].max()) + 1
        return torch.zeros(size).double().index_add(0, batch["batch"], rows)


class Smoothed(nn.Module):
    """A table whose rows are added up along the entries of sparse matrices: a constant one, and one of the records."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.table, self.bias = (nn.Parameter(torch.randn(*shape).double()) for shape in ((3, 4), (4,)))
        constant = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 0.0]]).double()
        self.constant, self.layout = constant.to_sparse(layout=layout), layout

    def forward(self, records: Tensor) -> Tensor:
        table = torch.mm(self.constant, self.table) + (self.table.t() @ self.constant).t()
        rows = records.to_sparse(layout=self.layout) @ table + (torch.sparse.mm(self.constant, table) @ self.bias).sum()
        return (rows @ self.bias).square()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_products_of_parameters_agree_with_batches_of_one(layout: torch.layout) -> None:
    torch.manual_seed(0)
    module, records = Smoothed(layout), torch.randn(4, 3).double() * torch.eye(4, 3)[[0, 1, 2, 0]]
    assert_agrees(module, module, lambda chosen: records[chosen])


PLACES = torch.tensor([[0, 1, 1, 2, 1], [1, 0, 2, 2, 2]])
MADE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda a, x: torch.sparse.mm(a, x.t()).t(),
    "coalesced": lambda a, x: (a.coalesce() @ x.t()).t(),
    "transposed and summed": lambda a, x: torch.spmm(a.t(), x.t()).t() * torch.sparse.sum(a, 1).to_dense(),
    "dense": lambda a, x: x @ (a.to_dense() + torch.eye(3)),
    "record by record": lambda a, x: torch.stack([torch.sparse.mm(a, row[:, None])[:, 0] for row in x]),
    "entries": lambda a, x: x * a.coalesce().values().sum(),
}


@pytest.mark.parametrize("how", list(MADE))
def test_matrices_made_of_parameters_agree_with_batches_of_one(how: str) -> None:
    """A place that is given twice gets the sum of two values."""
    torch.manual_seed(0)
    module = Uses(lambda m, x: MADE[how](torch.sparse_coo_tensor(m.places, m.w.tanh(), (3, 3)), x) * m.v, w=drawn(5))
    module.register_buffer("places", PLACES)
    module.v, records = nn.Parameter(drawn(3).double()), torch.randn(4, 3).double()
    before = torch.sparse_coo_tensor
    if how == "entries":
        with pytest.raises(PrivacyError, match="dense functions of private parameters, got one that values takes for"):
            make(module, lambda x: module(x).square().sum(1), lambda chosen: records[chosen])
    else:
        assert_agrees(module, lambda x: module(x).square().sum(1), lambda chosen: records[chosen])
    assert torch.sparse_coo_tensor is before


def of_graphs(chosen: list[int]) -> Graphs:
    """Some graphs in one."""
    return _collate_graphs([_graph(i) for i in chosen])


@pytest.mark.parametrize("how", [*WAYS, "pooled"])
def test_sparse_products_agree_with_batches_of_one(how: str) -> None:
    torch.manual_seed(0)
    module = Net({**WAYS, "pooled": pooled}[how])
    assert assert_agrees(module, module, of_graphs).follows_owners


def test_entries_between_two_samples_are_refused() -> None:
    def across(batch: Graphs, rows: Tensor) -> Tensor:
        edges = torch.cat([batch["edge_index"], torch.tensor([[0], [len(rows) - 1]])], 1)
        return torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]).double(), (len(rows),) * 2) @ rows

    module = Net(across)
    with pytest.raises(PrivacyError, match="meet rows of known samples, got rows that come from"):
        make(module, module, of_graphs)
