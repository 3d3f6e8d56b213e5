"""Modules that use parameters in any way, their losses and data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _loss(module: nn.Module):
    def loss(x: Tensor) -> Tensor:
        output = module(x).square()
        return output.flatten(1).sum(1) if output.dim() > 1 else output

    return loss


def _data(*shape: int) -> Tensor:
    return torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class LayerScale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A transformer block with every kind of parameter, called with the batch first or second."""

    def __init__(self, batch_first: bool = True, need_weights: bool = False) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.norm = RMSNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, dropout=0.0)
        self.need_weights = need_weights
        self.scale = LayerScale(4)
        self.activation = nn.PReLU()
        self.mlp = nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        y = self.norm(x)
        mixed, weights = self.attention(y, y, value=y, need_weights=self.need_weights)
        x = x + self.scale(mixed)
        x = x + self.activation(self.mlp(x))
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        return x if weights is None else x * weights.mean() if len(x) == 1 else x * weights.mean((1, 2))[:, None, None]


class Uses(nn.Module):
    """A function of parameters and samples."""

    def __init__(self, function: Any, **held: Any) -> None:
        super().__init__()
        self.function = function
        for name, thing in held.items():
            setattr(self, name, nn.Parameter(thing) if isinstance(thing, Tensor) else thing)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
