"""A scalar loss that sums over the batch: found before the first step, kept by resumed runs, refused in words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.loop import make_private
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, Recorder, make_dataset, make_loader, make_trainer
from tests.strategies.test_first_batch import Summed
from tests.strategies.test_models import Opaque

SAID, STATED = "The loss is a sum over the batch", "the loss of a batch taken for the sum of its records' losses"


def train(module: Any, tmp_path: Path, *, resume: Path | None = None, epochs: int = 1, **options: Any) -> DPStrategy:
    strategy = DPStrategy(**{"noise_multiplier": 0.0, **options})
    trainer = make_trainer(strategy, tmp_path, max_epochs=epochs)
    trainer.fit(module, make_loader(batch_size=64), ckpt_path=resume, weights_only=True if resume else None)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    return strategy


def first_gradient(module: Any, tmp_path: Path, **options: Any) -> dict[str, Tensor]:
    recorder = Recorder()
    strategy = DPStrategy(noise_multiplier=0.0, **options)
    make_trainer(strategy, tmp_path, callbacks=[recorder]).fit(module, make_loader(batch_size=64))
    return recorder.before_step[0]


class NoRule(Summed):
    """A sum of losses behind a function that no rule can follow."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.network = Opaque()


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 5}, {"per_sample_loss": True}], ids=str)
@pytest.mark.one_in(3)
def test_a_sum_trains_as_the_mean_of_the_same_losses(tmp_path: Path, options: Any) -> None:
    found = first_gradient(Summed(lr=0.0), tmp_path, **options)
    torch.testing.assert_close(found, first_gradient(Classifier(lr=0.0), tmp_path), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found, first_gradient(Summed(lr=0.0), tmp_path, loss_reduction="sum"), rtol=1e-4, atol=1e-6
    )


def test_a_sum_is_said_once_and_stated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        strategy = train(Summed(), tmp_path, epochs=3)
    assert sum(SAID in record.getMessage() for record in caplog.records) == 1
    assert STATED in strategy.privacy_statement()
    assert STATED not in train(Classifier(), tmp_path / "mean").privacy_statement()


def test_a_sum_that_no_rule_follows_runs_one_at_a_time(tmp_path: Path) -> None:
    strategy = train(NoRule(), tmp_path)
    assert STATED in strategy.privacy_statement()
    assert "one sample runs at a time" in strategy.privacy_statement()


def test_a_resumed_run_keeps_its_reading(tmp_path: Path) -> None:
    train(Summed(), tmp_path / "sum")
    strategy = train(Summed(), tmp_path / "again", resume=tmp_path / "sum" / "one.ckpt", epochs=2)
    assert strategy.state.loss_reduction == "sum"
    with pytest.raises(PrivacyError, match="something that depends on the batch's size"):
        train(Classifier(), tmp_path / "other", resume=tmp_path / "sum" / "one.ckpt", epochs=2)
    train(Classifier(), tmp_path / "mean")
    with pytest.raises(PrivacyError, match=r"not a mean\. Pass loss_reduction='sum'"):
        train(Summed(), tmp_path / "late", resume=tmp_path / "mean" / "one.ckpt", epochs=2)


@pytest.mark.slow
def test_a_new_run_of_the_same_strategy_finds_its_own_reading(tmp_path: Path) -> None:
    strategy = DPStrategy(noise_multiplier=1.0)
    for module, found in ((Summed(), "sum"), (Classifier(), "mean")):
        make_trainer(strategy, tmp_path).fit(module, make_loader())
        assert strategy.state.loss_reduction == found


class SumOfFew(Classifier):
    """A sum over small batches, a mean over large ones."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        reduction = "sum" if len(batch[0]) < 4 else "mean"
        return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction=reduction)


class SumAtFirst(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        reduction = "sum" if self.current_epoch == 0 else "mean"
        return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction=reduction)


class SumByChance(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        reduction = "sum" if float(torch.rand(())) < 0.9 else "mean"
        return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction=reduction)


class CentredSum(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self(batch[0] - batch[0].mean(0))
        return nn.functional.cross_entropy(scores, batch[1], reduction="sum")


@pytest.mark.parametrize("module", [SumOfFew, SumByChance, CentredSum])
def test_a_loss_that_is_no_sum_in_all_batches_is_refused(tmp_path: Path, module: Any) -> None:
    with pytest.raises(PrivacyError, match=r"differ|Expected the gradient of every sample"):
        train(module(), tmp_path)


def test_a_sum_that_becomes_a_mean_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="Expected the loss to stay the sum over a batch"):
        train(SumAtFirst(), tmp_path, epochs=3)


class Satisfied(Classifier):
    """A sum whose gradient is zero from the second epoch on, as of a hinge loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return (losses - 1e6 * (self.current_epoch > 0)).relu().sum()


@pytest.mark.slow
def test_a_sum_without_gradients_later_stays_a_sum(tmp_path: Path) -> None:
    assert train(Satisfied(), tmp_path, epochs=3).ledger.num_steps == 3


def test_a_loop_finds_a_sum_before_its_first_step_only() -> None:
    torch.manual_seed(0)
    model = nn.Linear(NUM_FEATURES, NUM_CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = torch.utils.data.DataLoader(make_dataset(32), batch_size=32, shuffle=True)

    def total(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def mean(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with make_private(model, optimizer, loader, total, noise_multiplier=0.0) as private:
        private.step(next(iter(private.loader)))
        expected = float(mean(model, make_dataset(32).tensors).detach())
        assert private.nonprivate_loss == pytest.approx(expected, rel=1e-5)
        assert STATED in private.privacy_statement()
        with pytest.raises(PrivacyError, match="something that depends on the batch's size"):
            private.backward(next(iter(private.loader)), mean)
