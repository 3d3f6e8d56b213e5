"""Who owns the memory of a tensor, and that no buffer is used again while tuning is off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.clipping import FlatClipping
from lightning_dp.noise import GaussianNoise
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.system import ProcessTuning
from lightning_dp.system.owners import is_shared

OWNERS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda tensor: tensor[1:],
    "detached": lambda tensor: tensor.detach(),
    "array": lambda tensor: tensor.numpy(),
    "storage": lambda tensor: tensor.untyped_storage(),
}


@pytest.mark.parametrize("kind", OWNERS)
def test_a_second_owner_is_seen_until_it_is_gone(kind: str) -> None:
    tensor = torch.zeros(3)
    assert not is_shared(tensor)
    owner = OWNERS[kind](tensor)
    assert is_shared(tensor)
    del owner
    assert not is_shared(tensor)


def test_what_torch_does_not_tell_counts_as_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_shared(torch.zeros(1, device="meta"))
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert is_shared(torch.zeros(1))


@pytest.mark.parametrize("enabled", [True, False])
def test_buffers_are_used_again_unless_tuning_is_off(enabled: bool) -> None:
    with ProcessTuning(enabled):
        weight = nn.Parameter(torch.zeros(1000))
        sums = Accumulator({"weight": weight}, FlatClipping())
        places = []
        for _ in range(3):
            sums.begin_with_noise(GaussianNoise(), 1.0)
            sums.write_grads(sums.gradient, 1)
            assert weight.grad is not None
            places.append(weight.grad.data_ptr())
            weight.grad = None
            filler = torch.zeros(1000)  # takes the memory that was freed
    assert (len(set(places)) == 1) == enabled
    assert filler.numel() == 1000
