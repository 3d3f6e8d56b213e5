"""What a private step leaves behind: no cycles of objects, which keep batch and graph until a garbage collection."""

from __future__ import annotations

import gc
from types import FunctionType
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy
from tests.helpers import NUM_FEATURES, Classifier, make_loader, make_trainer


class Collector(L.Callback):
    """Names the kinds of objects that only a garbage collection frees after each batch, from the second one on."""

    def __init__(self) -> None:
        self.found: list[set[str]] = []

    def on_train_batch_start(self, *given: Any) -> None:
        gc.collect()
        gc.disable()

    def on_train_batch_end(self, *given: Any) -> None:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        kinds = [each if type(each) is FunctionType else type(each) for each in gc.garbage]
        self.found.append({f"{kind.__module__}.{kind.__qualname__}" for kind in kinds})
        gc.garbage.clear()
        gc.enable()


class OfParameters(nn.Module):
    """A weight that is computed from parameters, and a scale for each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.randn(3, NUM_FEATURES)), nn.Parameter(torch.zeros(3, NUM_FEATURES))
        self.scale = nn.Parameter(torch.ones(NUM_FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x * self.scale, self.mean + self.log_std.exp() * torch.randn(3, NUM_FEATURES))


class OfRows(nn.Module):
    """Rows of a sample that an index adds up, and a parameter that meets rows entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(1, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        owners = torch.arange(len(x)).repeat_interleave(NUM_FEATURES)
        rows = self.layer(x.reshape(-1, 1)) + self.shift
        return rows.new_zeros(len(x), 3).index_add(0, owners, rows)


@pytest.mark.parametrize("network", [OfParameters, OfRows])
@pytest.mark.slow  # a collection looks at all objects of the process
def test_a_step_leaves_no_cycles(tmp_path: Any, network: type[nn.Module]) -> None:
    collector = Collector()
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, callbacks=[collector])
    trainer.fit(Classifier(network()), make_loader())
    assert len(collector.found) == 4
    for found in collector.found[1:]:
        assert not {name for name in found if name.startswith(("lightning_dp", "torch.Tensor"))}
