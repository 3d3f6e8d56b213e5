"""Activation checkpointing around every kind of unit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.per_sample.checks import assert_engine_agrees
from tests.per_sample.test_uses import _data, _loss


class Checkpointed(nn.Module):
    """A checkpointed block with every kind of unit in it."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.shift = nn.Parameter(torch.randn(1, 4, 3))
        self.gain = nn.Parameter(torch.rand(3))
        self.double()

    def block(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.block(self.block(x) * self.gain + self.shift)
        x = checkpoint(self.block, x.requires_grad_(), use_reentrant=self.use_reentrant)
        return checkpoint(self.block, x * self.gain + self.shift, use_reentrant=self.use_reentrant)


class Outer(nn.Module):
    """The whole module above in a checkpoint, its bare parameters included."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.inner = Checkpointed(None)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("kind", [Checkpointed, Outer])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("with_backward", [False, True])
def test_checkpointed_blocks(kind: type, use_reentrant: bool, with_backward: bool) -> None:
    torch.manual_seed(0)
    module = kind(use_reentrant)

    def single(x: Tensor) -> Tensor:
        module.use_reentrant = None
        result = _loss(module)(x)
        module.use_reentrant = use_reentrant
        return result

    assert_engine_agrees(module, _loss(module), _data(4, 3), with_backward=with_backward, single_loss=single)
