"""Layers that other code has made: scripts, traces, and layers with hooks that the first forward registers."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.strategies.test_ways import CLASSES, FEATURES, fit


class Model(L.LightningModule):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(5, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.layer(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 5)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("traced", [False, True])
def test_scripted_and_traced_layers_train_one_by_one(traced: bool, caplog: pytest.LogCaptureFixture) -> None:
    layer: Any = torch.jit.trace(layers(), torch.ones(2, FEATURES)) if traced else torch.jit.script(layers())
    before = layer(torch.ones(1, FEATURES))
    with caplog.at_level(logging.INFO):
        fit(Model(layer), max_epochs=2)
    assert "Samples run one at a time" in caplog.text
    assert not torch.equal(layer(torch.ones(1, FEATURES)), before)


class Capturing(nn.Module):
    """Collects what its layers return, by hooks that its first forward registers, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "is_hooked", False):
            for layer in self.layers:
                layer.register_forward_hook(lambda layer, args, out: self.collected.append(out))
            self.is_hooked = True
        self.collected: list[Tensor] = []
        self.layers(x)
        found, self.collected = self.collected, []
        assert len(found) == 3
        out: Tensor = sum(found, torch.zeros(1))
        return out


def test_hooks_that_the_first_forward_registers_stay_single() -> None:
    fit(Model(Capturing()), max_epochs=2, grad_sample="rules")
