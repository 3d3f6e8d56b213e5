"""Cases of graphs and molecules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.public_cases.registry import BATCH, Task, case, fit


def graphs() -> list[Any]:
    """Return random graphs of different size."""
    from torch_geometric.data import Data

    torch.manual_seed(0)
    made = []
    for number in range(64):
        size = 3 + number % 5
        edges = torch.randint(size, (2, 3 * size))
        made.append(Data(x=torch.randn(size, 6), edge_index=edges, y=torch.tensor([number % 3])))
    return made


@case("torch_geometric")
def gcn(arguments: dict[str, Any]) -> None:
    """Two graph convolutions and a mean over the nodes of each graph."""
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = GCNConv(6, 8), GCNConv(8, 8), nn.Linear(8, 3)

        def forward(self, batch: Any) -> Any:
            hidden = self.first(batch.x, batch.edge_index).relu()
            return self.head(global_mean_pool(self.second(hidden, batch.edge_index), batch.batch))

    task = Task(Net(), lambda net, batch: nn.functional.cross_entropy(net(batch), batch.y))
    fit(task, GraphLoader(graphs(), batch_size=BATCH, shuffle=True), arguments)


@case("torch_geometric")
def gat(arguments: dict[str, Any]) -> None:
    """Graph attention with an attentional pooling."""
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import AttentionalAggregation, GATv2Conv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = GATv2Conv(6, 4, heads=2), nn.Linear(8, 3)
            self.pool = AttentionalAggregation(nn.Linear(8, 1))

        def forward(self, batch: Any) -> Any:
            return self.head(self.pool(self.first(batch.x, batch.edge_index).relu(), batch.batch))

    task = Task(Net(), lambda net, batch: nn.functional.cross_entropy(net(batch), batch.y))
    fit(task, GraphLoader(graphs(), batch_size=BATCH, shuffle=True), arguments)


@case("torch_geometric")
def gin(arguments: dict[str, Any]) -> None:
    """Graph isomorphism network with jumping knowledge and a sum over nodes."""
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GIN, global_add_pool

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = GIN(6, 8, num_layers=2, jk="cat", train_eps=True), nn.Linear(8, 3)

        def forward(self, batch: Any) -> Any:
            return self.head(global_add_pool(self.body(batch.x, batch.edge_index), batch.batch))

    task = Task(Net(), lambda net, batch: nn.functional.cross_entropy(net(batch), batch.y))
    fit(task, GraphLoader(graphs(), batch_size=BATCH, shuffle=True), arguments)


@case("torch_geometric")
def hetero(arguments: dict[str, Any]) -> None:
    """Messages between two kinds of nodes, and a mean over the nodes of each kind."""
    from torch_geometric.data import HeteroData
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import HeteroConv, SAGEConv, global_mean_pool

    torch.manual_seed(0)
    to, back = ("user", "rates", "film"), ("film", "is rated by", "user")
    made = []
    for number in range(64):
        graph, users, films = HeteroData(), 3 + number % 4, 2 + number % 3
        graph["user"].x, graph["film"].x = torch.randn(users, 6), torch.randn(films, 5)
        edges = torch.stack([torch.randint(users, (2 * users,)), torch.randint(films, (2 * users,))])
        graph[to].edge_index, graph[back].edge_index = edges, edges.flip(0)
        graph.y = torch.tensor([number % 3])
        made.append(graph)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = HeteroConv({to: SAGEConv((6, 5), 8), back: SAGEConv((5, 6), 8)}), nn.Linear(16, 3)

        def forward(self, batch: Any) -> Any:
            hidden = self.body(batch.x_dict, batch.edge_index_dict)
            pooled = [global_mean_pool(hidden[kind].relu(), batch[kind].batch) for kind in ("user", "film")]
            return self.head(torch.cat(pooled, 1))

    task = Task(Net(), lambda net, batch: nn.functional.cross_entropy(net(batch), batch.y))
    fit(task, GraphLoader(made, batch_size=BATCH, shuffle=True), arguments)


@case("torch_geometric")
def schnet(arguments: dict[str, Any]) -> None:
    """SchNet: continuous filters over the distances of atoms."""
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn.models import SchNet

    class Plain(SchNet):  # type: ignore[misc]
        """SchNet with edges of all pairs of a graph, for machines without a package of neighbours."""

    def edges(position: Any, batch: Any) -> Any:
        pairs = (batch[:, None] == batch[None]) & ~torch.eye(len(batch), dtype=torch.bool)
        index = pairs.nonzero().T
        return index, (position[index[0]] - position[index[1]]).norm(dim=-1)

    torch.manual_seed(0)
    data = [
        Data(z=torch.randint(1, 9, (3 + i % 4,)), pos=torch.randn(3 + i % 4, 3), y=torch.randn(1)) for i in range(64)
    ]
    net = Plain(hidden_channels=8, num_filters=8, num_interactions=2, num_gaussians=8, interaction_graph=edges)

    def loss(net: Any, batch: Any) -> Any:
        return nn.functional.mse_loss(net(batch.z, batch.pos, batch.batch).squeeze(-1), batch.y)

    fit(Task(net, loss), GraphLoader(data, batch_size=BATCH), arguments)
