"""Values that a step reads back from its device: on a GPU each read waits for all that was asked for before."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import make_private
from lightning_dp.per_sample.rules import base, conv
from lightning_dp.sampling.indices import PoissonBatchSampler
from lightning_dp.sandbox import kept_tensors
from lightning_dp.sandbox.kept_tensors import same_values
from lightning_dp.sandbox.snapshot import Snapshot

READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique_dim", "_unique2", "masked_select"}


class Reads(TorchDispatchMode):
    """Counts operations whose result depends on values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Words(nn.Module):
    """A transformer of ``depth`` layers, with learned positions."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.zeros(1, 6, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x) + self.positions).mean(1))


class Images(nn.Module):
    """Convolutions of the same words as pictures of one row."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), nn.GroupNorm(1, 1), nn.GELU()) for _ in range(depth)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x[:, None].float()).flatten(1))


def reads_of_a_step(model: nn.Module, **options: Any) -> int:
    """Values that the fourth step of a run reads back."""
    data = TensorDataset(torch.randint(0, 11, (64, 6)), torch.randint(0, 3, (64,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    given = {"noise_multiplier": 1.0, "target_delta": 1e-3, "steps": 10, "check_per_sample": False, **options}
    with make_private(model, optimizer, DataLoader(data, batch_size=32), loss_fn, **given) as private:
        batches = (batch for _ in range(5) for batch in private.loader)
        for _ in range(3):
            private.step(next(batches))
        batch = next(batches)
        with Reads() as reads:
            private.step(batch)
    return sum(reads.found.values())


@pytest.mark.parametrize("kind", [Words, Images])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.one_in(3)
def test_a_step_reads_as_much_whatever_its_depth(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], clipping: str
) -> None:
    for module in (base, conv):
        monkeypatch.setattr(module, "is_cheap_to_read", lambda tensor: False)
    few, many = (reads_of_a_step(kind(depth), clipping=clipping) for depth in (1, 4))
    assert few == many <= 2


def test_microbatches_compare_all_state_by_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, momentum and random state are compared after a step; a read for each would grow with the depth."""
    for module in (base, conv):
        monkeypatch.setattr(module, "is_cheap_to_read", lambda tensor: False)
    monkeypatch.setattr(kept_tensors, "_is_near", lambda tensor: False)
    monkeypatch.setattr(PoissonBatchSampler, "__iter__", lambda self: iter([self._records(np.arange(32))] * 2))
    few, many = (reads_of_a_step(Words(depth), microbatch_size=8) for depth in (1, 4))
    assert few == many <= 12  # 4 microbatches


def test_state_on_a_device_is_put_back_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_tensors, "_is_near", lambda tensor: False)
    layer = nn.Linear(2, 1)
    layer.register_buffer("odd", torch.tensor([float("nan"), 0.0]))
    snapshot, before = Snapshot([layer]), copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer.weight.data += 1
        layer.odd[1] = -0.0
    with Reads() as reads:
        snapshot.put_back()
    assert sum(reads.found.values()) <= len(before)  # of one list
    assert all(same_values(value, before[name]) for name, value in layer.state_dict().items())
