"""Parameters that no loss uses get noise like all others, and a notice names them before the first step."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dp import DPStrategy
from tests.helpers import Classifier, make_loader, make_trainer

SAID = "No loss of the checks used"


class Pooling(Classifier):
    """Computes a layer whose result no loss reads, as token classifiers on pretrained encoders do."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.pooler, self.later = nn.Linear(3, 5).requires_grad_(not frozen), nn.Linear(2, 4).requires_grad_(not frozen)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.pooled = self.pooler(torch.ones(len(batch[0]), 3)).detach()
        return super().training_step(batch, batch_idx)


class Seldom(Classifier):
    """Steps a second optimizer on every fourth batch."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.automatic_optimization = nn.Linear(3, 2), False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.network, self.other)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 4 == 3:
            loss = loss + self.other(torch.ones(len(batch[0]), 3)).square().mean()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 4 == 3:
            second.step()


@pytest.mark.parametrize("grad_sample", ["rules", "single"])
@pytest.mark.one_in(2)
def test_unused_parameters_are_named_and_get_noise(tmp_path: Any, caplog: Any, grad_sample: Any) -> None:
    caplog.set_level(logging.INFO)
    module = Pooling()
    before = module.later.weight.detach().clone()
    make_trainer(DPStrategy(noise_multiplier=1.0, grad_sample=grad_sample), tmp_path).fit(module, make_loader())
    share = 32 / sum(parameter.numel() for parameter in module.parameters())
    assert caplog.text.count(f"{SAID} {share:.0%} of the private parameters (pooler.weight, pooler.bias") == 1
    assert bool((module.later.weight != before).all())


@pytest.mark.parametrize(
    "module", [Classifier, lambda: Pooling(frozen=True), Seldom], ids=["used", "frozen", "another step"]
)
@pytest.mark.one_in(3)
def test_nothing_is_said_where_all_may_be_used(tmp_path: Any, caplog: Any, module: Any) -> None:
    caplog.set_level(logging.INFO)
    make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, limit_train_batches=2).fit(module(), make_loader())
    assert SAID not in caplog.text
