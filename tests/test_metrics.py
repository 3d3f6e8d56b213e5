"""Epsilon as a torchmetrics Metric."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_dp import DPStrategy, Epsilon, Ledger, PrivacyEvent
from tests.helpers import Classifier, make_loader, make_trainer


def test_epsilon_reads_the_ledger_and_reset_leaves_it(tmp_path: Any) -> None:
    ledger = Ledger()
    metric = Epsilon(ledger, delta=1e-5, accountant="gdp")
    assert math.isnan(metric.compute())
    ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
    metric.reset()
    assert float(metric.compute()) == pytest.approx(4.377178, abs=1e-5)
    metric.reset()
    ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
    assert float(metric.compute()) > 4.4
    assert ledger.num_steps == 2


def test_epsilon_logged_as_a_metric_object_survives_the_epochs(tmp_path: Any) -> None:
    """Lightning resets a logged Metric every epoch; epsilon must go on growing."""
    strategy = DPStrategy(noise_multiplier=1.3, target_delta=1e-5, accountant="rdp")
    ends: list[float] = []

    class Logging(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.epsilon = Epsilon(strategy, delta=1e-5)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("epsilon", self.epsilon, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            ends.append(float(self.epsilon.compute()))

    make_trainer(strategy, tmp_path, max_epochs=3).fit(Logging(), make_loader(batch_size=32))
    assert ends[0] < ends[1] < ends[2]
    assert ends[2] == pytest.approx(strategy.epsilon())


def test_epsilon_computed_twice_is_that_of_now() -> None:
    """A Metric keeps what it has computed until its next update, which this one never gets."""
    ledger = Ledger()
    metric = Epsilon(ledger, delta=1e-5, accountant="gdp", compute_with_cache=True)
    ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
    before = float(metric.compute())
    ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
    assert float(metric.compute()) > before + 1.0


def test_epsilon_refuses_what_is_no_ledger() -> None:
    with pytest.raises(TypeError, match="private strategy or a Ledger, got Tensor"):
        Epsilon(torch.ones(1), delta=1e-5)
    with pytest.raises(ValueError, match="0 < delta < 1"):
        Epsilon(Ledger(), delta=1.0)
