"""Lazy layers: their parameters get shapes before the first step, from the shapes of records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from lightning_dp import DPStrategy
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, make_loader, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")


class Scale(LazyModuleMixin, nn.Module):  # type: ignore[misc]
    """Starts from the mean of its first batch, as data-dependent initialisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = UninitializedParameter()
        self.started_from: Tensor | None = None

    def initialize_parameters(self, x: Tensor) -> None:
        self.started_from = x.detach().mean(0)
        with torch.no_grad():
            self.weight.materialize(x.shape[1:])
            self.weight.copy_(self.started_from)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.exp()


class Counting(Classifier):
    """Keeps a count of its steps."""

    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        return super().training_step(batch, batch_idx)


def fit(module: Any, tmp_path: Path, **options: Any) -> DPStrategy:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, **options)
    make_trainer(strategy, tmp_path, max_epochs=1).fit(module, make_loader())
    return strategy


def test_lazy_layers_train_and_other_state_stays(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.Tanh(), nn.LazyLinear(5), nn.LazyLinear(NUM_CLASSES))
    module = Counting(layers)
    assert fit(module, tmp_path).ledger.num_steps == 4
    assert module.calls == 4
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]
    assert layers[2].weight.shape == (5, 4)


def test_lazy_layers_start_from_no_values_of_records(tmp_path: Path) -> None:
    layers = nn.Sequential(Scale(), nn.LazyLinear(NUM_CLASSES))
    fit(Classifier(layers), tmp_path)
    assert torch.equal(layers[0].started_from, torch.zeros(NUM_FEATURES))


@pytest.mark.slow
def test_lazy_batch_norms_are_replaced_once_they_have_shapes(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(NUM_CLASSES))
    fit(Classifier(layers), tmp_path, fix=True)
    assert type(layers[1]) is nn.GroupNorm


def test_no_optimizer_steps_while_layers_get_shapes(tmp_path: Path) -> None:
    class Stepping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.network[0](batch[0]).sum().backward()
            torch.optim.SGD(self.network[0].parameters(), lr=0.1).step()
            return super().training_step(batch, batch_idx)

    module = Stepping(nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(NUM_CLASSES)))
    with pytest.raises(ValueError, match="of a lazy layer") as raised:
        fit(module, tmp_path)
    assert "stepped by itself" in str(raised.value.__context__)
    assert module.network[0].weight.grad is None


@pytest.mark.slow
def test_lazy_layers_that_no_step_reaches_are_refused(tmp_path: Path) -> None:
    module = Classifier(nn.Sequential(nn.LazyLinear(NUM_CLASSES)))
    module.spare = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=r"Expected parameters with a shape, got 'spare.weight' of a lazy layer"):
        fit(module, tmp_path)
