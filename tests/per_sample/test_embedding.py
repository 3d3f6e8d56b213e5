"""Embeddings: sums of equal tokens, padding, refused options, positions without a batch axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from tests.per_sample.checks import assert_engine_agrees, make_engine, run_batch


def _loss(module: nn.Module):
    return lambda x: module(x).square().flatten(1).sum(1)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4)])
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embedding_agrees_with_batches_of_one(shape: tuple[int, ...], padding_idx: int | None) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(5, 3, padding_idx=padding_idx), nn.Tanh(), nn.Linear(3, 2)).double()
    if padding_idx is not None:
        nn.init.normal_(module[0].weight)
    data = torch.randint(0, 5, (6, *shape))
    for size in (0, 1, 6):
        assert_engine_agrees(module, _loss(module), data, size=size)


def test_embedding_called_twice_adds_gradients_before_the_norm() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x[:, :3]).sum(1) * self.table(x[:, 3])

    module = Pair().double()
    assert_engine_agrees(module, _loss(module), torch.randint(0, 6, (6, 4)))


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embedding_refuses_what_is_not_private(option: dict[str, Any]) -> None:
    module = nn.Embedding(5, 3, **option)
    data = torch.randint(0, 5, (6, 2))
    engine = make_engine(module, _loss(module), data)
    with pytest.raises(PrivacyError, match=f"got .*{next(iter(option))}={next(iter(option.values()))}"):
        run_batch(engine, _loss(module), data, 4)


def test_sparse_embeddings_get_dense_gradients() -> None:
    module = nn.Embedding(5, 3, sparse=True).double()
    dense = nn.Embedding.from_pretrained(module.weight.detach().clone(), freeze=False)
    data = torch.randint(0, 5, (6, 2))
    found = []
    for layer in (module, dense):
        engine = make_engine(layer, _loss(layer), data)
        run_batch(engine, _loss(layer), data, 6)
        found.append(engine.per_sample_gradients()["weight"])
    assert torch.equal(*found)


class Positions(nn.Module):
    """Token and position embedding; ``how`` is how the positions are passed."""

    def __init__(self, how: str, length: int = 5) -> None:
        super().__init__()
        self.how = how
        self.token = nn.Embedding(7, 4)
        self.position = nn.Embedding(length, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        if self.how == "flat":
            positions = self.position(steps)
        elif self.how == "row":
            positions = self.position(steps.unsqueeze(0))
        elif self.how == "after":
            positions = self.position(steps).unsqueeze(0)
        elif self.how == "keyword":
            positions = self.position(input=steps[None])
        else:
            positions = self.position(steps).repeat(x.shape[0], 1, 1)
        return self.head(self.norm(self.token(x) + positions))


@pytest.mark.parametrize("how", ["flat", "row", "keyword", "after", "repeat"])
@pytest.mark.parametrize("size", [1, 5, 6])
def test_positions_without_batch_axis(how: str, size: int) -> None:
    """Also where the length is the batch size (5). They are functions of the table, or repeated for every sample."""
    torch.manual_seed(0)
    module = Positions(how).double()
    assert_engine_agrees(module, _loss(module), torch.randint(0, 7, (6, 5)), size=size)
