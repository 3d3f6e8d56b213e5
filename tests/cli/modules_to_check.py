"""Modules that the tests of ``lightning-dp check`` point at."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn


class Private(L.LightningModule):
    """Nothing must change."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(3, hidden), nn.PReLU()
        self.second = nn.Linear(3, hidden)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.token = nn.Parameter(torch.zeros(1, 3))


class Mixed(nn.Module):
    """Two layers must change, one can."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32))
        self.rnn = nn.LSTM(3, 4, proj_size=2)
        self.attention = nn.MultiheadAttention(4, 2)


made = Private(hidden=7)


def number() -> int:
    return 3


class Broken(nn.Module):
    def __init__(self, size: int) -> None:
        raise RuntimeError(f"no size {size}")
