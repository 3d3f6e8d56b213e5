"""Replicas start equal, whatever the memory layout of their tensors is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_dp.step.units import start_equal


def test_start_equal_sends_parameters_and_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 holds threes; a collective refuses what is not contiguous."""

    def broadcast(tensor: torch.Tensor, src: int) -> None:
        assert tensor.is_contiguous()
        assert src == 0
        tensor.fill_(3)

    monkeypatch.setattr(dist, "broadcast", broadcast)
    module: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    module.to(memory_format=torch.channels_last)
    assert not module[0].weight.is_contiguous()
    start_equal(module)
    for tensor in (*module.parameters(), *module.buffers()):
        assert bool((tensor == 3).all())
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
