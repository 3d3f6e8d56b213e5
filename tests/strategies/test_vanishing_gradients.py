"""Gradients that are zero up to rounding before the first step are compared under other weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import Classifier, Hidden, make_loader, make_trainer

Mix = Callable[[Tensor], Tensor]


class Student(Classifier):
    """Begins as its teacher."""

    def __init__(self, mix: Mix = lambda logits: logits) -> None:
        super().__init__(lr=0.0)  # so that it stays its teacher
        self.teacher, self.mix = copy.deepcopy(self.network).requires_grad_(False), mix

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, wanted = self.mix(self(batch[0])), self.mix(self.teacher(batch[0]))
        return F.kl_div(logits.log_softmax(1), wanted.softmax(1), reduction="batchmean")


class Even(Classifier):
    """Gives all classes the same score at first, which is what its loss asks for."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        nn.init.zeros_(self.network[2].weight)
        nn.init.zeros_(self.network[2].bias)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self(batch[0]).log_softmax(1).mean()


class HiddenStudent(Student):
    """No rule follows its first layer."""

    def forward(self, features: Tensor) -> Tensor:
        return self.network[1:](Hidden.apply(features, self.network[0].weight.mT))


def fit(module: Classifier, tmp_path: Any) -> Any:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    make_trainer(strategy, tmp_path, max_steps=2).fit(module, make_loader())
    return strategy


@pytest.mark.parametrize("kind", [Student, Even])
def test_a_loss_that_is_least_at_first_trains(kind: type[Classifier], tmp_path: Any) -> None:
    strategy = fit(kind(), tmp_path)
    assert strategy.ledger.num_steps == 2
    assert not strategy.state.runs_alone


@pytest.mark.parametrize("kind", [Student, HiddenStudent])
def test_a_coupling_at_a_loss_that_is_least_is_refused(kind: type[Student], tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match="samples influence each other"):
        fit(kind(lambda logits: logits - logits.mean(0)), tmp_path)


def test_a_loss_that_is_least_runs_one_at_a_time(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert fit(HiddenStudent(), tmp_path).state.runs_alone
    assert "Samples run one at a time" in caplog.text
