"""What a training step may return: a loss, none, or one of another shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import Classifier, Recorder, make_dataset, make_loader, make_trainer
from tests.strategies.test_private_step import clipped_sum


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@pytest.mark.parametrize("returned", [None, "shape (B,)", "dict"])
@pytest.mark.one_in(3)
def test_what_training_step_may_return(tmp_path: Any, returned: str | None) -> None:
    class Returning(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return {None: None, "shape (B,)": losses, "dict": {"loss": losses.mean(), "more": 1}}[returned]

    recorder, module = Recorder(), Returning(lr=0.0)
    strategy = DPStrategy(noise_multiplier=0.0, max_grad_norm=1.4)
    make_trainer(strategy, tmp_path, callbacks=[recorder]).fit(module, make_loader(batch_size=64))
    assert strategy.ledger.num_steps == 1
    expected = clipped_sum(module, *make_dataset().tensors, max_grad_norm=1.4)
    for name, gradient in recorder.before_step[0].items():
        target = torch.zeros_like(gradient) if returned is None else expected[name] / 64
        torch.testing.assert_close(gradient, target, rtol=1e-4, atol=1e-6)


def test_a_loss_of_one_element_counts_as_a_scalar(tmp_path: Any) -> None:
    class Scaled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.scale * super().training_step(batch, batch_idx)

    strategy = DPStrategy(noise_multiplier=1.0)
    make_trainer(strategy, tmp_path).fit(Scaled(), make_loader())
    assert strategy.ledger.num_steps == 4


def test_a_loss_of_weights_alone_is_refused_for_what_it_is(tmp_path: Any) -> None:
    class Alone(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.network[0].weight.square().sum()

    with pytest.raises(PrivacyError, match="a penalty on weights"):
        make_trainer(DPStrategy(noise_multiplier=1.0, grad_sample="rules"), tmp_path).fit(Alone(), make_loader())


def test_a_loss_of_another_shape_is_refused(tmp_path: Any) -> None:
    class Matrix(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    with pytest.raises(ValueError, match=r"Expected a loss of shape \(\) or \(B,\)"):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(Matrix(), make_loader())


def test_rules_refuse_a_weight_penalty_in_the_loss(tmp_path: Any) -> None:
    class Penalised(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 1e-3 * self.network[0].weight.square().sum()

    with pytest.raises(PrivacyError, match="weight"):
        make_trainer(DPStrategy(noise_multiplier=1.0, grad_sample="rules"), tmp_path).fit(Penalised(), make_loader())
