"""Recurrent layers that start from rows without data, for rows of unequal number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from tests.per_sample.owners import _collate_graphs, _features, _graph, assert_agrees, make, record

LAYERS: dict[str, nn.Module] = {
    "lstm": nn.LSTM(6, 3),
    "lstm with projection": nn.LSTM(6, 5, proj_size=3),
    "lstm without bias": nn.LSTM(6, 3, bias=False),
    "gru": nn.GRU(6, 3),
    "tanh": nn.RNN(6, 3),
    "relu": nn.RNN(6, 3, nonlinearity="relu"),
}


class Queries(nn.Module):
    """Queries of each graph, which start from zeros, and sums over its nodes that these weigh, for some turns."""

    def __init__(self, layer: nn.Module, how: str, times: int = 1) -> None:
        super().__init__()
        self.layer, self.how, self.times = layer.double(), how, times
        self.first, self.last = nn.Linear(3, 3).double(), nn.Linear(6, 1).double()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        rows, owners = self.first(batch["x"]), batch["batch"]
        size = int(owners.max()) + 1
        query, state = torch.zeros(size, 6).double(), None
        if self.how == "rows unlike each other":
            query = query + torch.arange(size).double()[:, None]
        for turn in range(3):
            made, state = self.layer(query.expand(self.times, -1, -1), state)
            asked = made[-1]
            if turn == 0 and self.how == "rows in another order":
                asked = asked.flip(0)
            weights = (rows * asked[owners]).sum(1, keepdim=True).tanh()
            found = torch.zeros(size, 3).double().index_add(0, owners, weights * rows)
            query = torch.cat([made[-1], found], 1)
        return self.last(query).squeeze(1).square()


def batch_of(chosen: list[int]) -> Any:
    return _collate_graphs([_graph(i) for i in chosen])


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("how", ["one time", "two times", "rows in another order"])
@pytest.mark.one_in(3)
def test_layers_that_start_from_zeros_agree(name: str, how: str) -> None:
    torch.manual_seed(0)
    module = Queries(LAYERS[name], how, times=1 + (how == "two times"))
    assert assert_agrees(module, module, batch_of).follows_owners


def test_a_layer_that_starts_from_unlike_rows_keeps_them_apart() -> None:
    """By its place in the batch, which couples samples; a comparison with samples run alone finds that."""
    torch.manual_seed(0)
    module, batch = Queries(nn.LSTM(6, 3), "rows unlike each other"), batch_of([0, 1, 2, 3])
    engine = make(module, module, batch_of)
    record(engine, module, batch, 4)
    found = engine.per_sample_gradients()
    engine.end()
    losses, names = module(batch), [name for name, _ in module.named_parameters()]
    for sample, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, [*module.parameters()], retain_graph=True)
        for name, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(found[name][sample], grad)


class OneSequence(nn.Module):
    """All nodes of a batch in one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 3).double()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        rows, owners = self.layer(batch["x"].unsqueeze(1))[0].squeeze(1), batch["batch"]
        return torch.zeros(int(owners.max()) + 1).double().index_add(0, owners, rows.square().sum(1))


def test_a_sequence_that_holds_several_samples_is_refused() -> None:
    module = OneSequence()
    with pytest.raises(PrivacyError, match=r"Expected each sequence of gru to belong to one sample, got rows of sev"):
        make(module, module, batch_of)


class Prompt(nn.Module):
    """States of a layer along a learned prompt, which meet all records, as in P-tuning."""

    def __init__(self, layer: nn.Module, *, repeats: bool) -> None:
        super().__init__()
        self.prompt, self.repeats = nn.Parameter(torch.randn(1, 4, 6)), repeats
        self.layer, self.first = layer, nn.Linear(3, 6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        prompt = self.prompt.repeat(len(x), 1, 1) if self.repeats else self.prompt
        return (self.layer(prompt)[0].mean(1) * self.first(x)).sum(1).tanh()


@pytest.mark.parametrize("repeats", [False, True])
def test_layers_on_parameters_alone_agree(repeats: bool) -> None:
    torch.manual_seed(0)
    module, data = Prompt(nn.LSTM(6, 3, 2, batch_first=True, bidirectional=True), repeats=repeats), _features(6, 3)
    assert not assert_agrees(module, module, lambda chosen: data[chosen]).follows_owners
