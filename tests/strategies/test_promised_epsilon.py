"""Epsilon and targets under what a run may do with its loader, its steps and its searches: paid, or refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch.utils.data import DataLoader

from lightning_dp import DPStrategy, PrivacyBudget, PrivacyError
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from tests.helpers import Classifier, make_loader, make_trainer
from tests.strategies.test_manual import Manual, TwoOptimizers
from tests.strategies.test_soundness import private


def test_reloaded_loader_is_accounted_with_its_batch_size(tmp_path: Path) -> None:
    class Growing(Classifier):
        def train_dataloader(self) -> DataLoader:
            return make_loader(batch_size=16 if self.trainer.current_epoch == 0 else 32)

    strategy = private()
    make_trainer(strategy, tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(Growing())
    assert [(run.num_steps, run.event.sample_rate) for run in strategy.ledger.entries] == [(4, 0.25), (2, 0.5)]
    assert strategy.plan.expected_batch_size == 32


def test_batch_size_search_is_accounted_or_refused(tmp_path: Path) -> None:
    class Sized(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"batch_size": 2})

        def train_dataloader(self) -> DataLoader:
            return make_loader(batch_size=self.hparams.batch_size)

    finder = {"mode": "power", "steps_per_trial": 2, "max_trials": 2, "init_val": 2}
    strategy = private()
    make_trainer(strategy, tmp_path, callbacks=[BatchSizeFinder(**finder)]).fit(Sized(), val_dataloaders=make_loader())
    final = strategy.ledger.entries[-1].event.sample_rate
    assert final == strategy.plan.expected_batch_size / 64
    assert len({run.event.sample_rate for run in strategy.ledger.entries}) > 1
    with pytest.raises(ValueError, match="a search for it"):
        make_trainer(DPStrategy(target_epsilon=1.0), tmp_path, callbacks=[BatchSizeFinder(**finder)]).fit(Sized())


@pytest.mark.parametrize("later", [8, 64])
def test_a_target_holds_after_a_resume_with_another_batch_size(tmp_path: Path, later: int) -> None:
    def target() -> DPStrategy:
        return DPStrategy(target_epsilon=2.0, target_delta=1e-3, check_per_sample=False)

    class Stopping(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "two.ckpt")
                trainer.should_stop = True

    make_trainer(target(), tmp_path, max_epochs=4, callbacks=[Stopping()]).fit(Classifier(), make_loader())
    strategy = target()
    trainer = make_trainer(strategy, tmp_path, max_epochs=4)
    trainer.fit(Classifier(), make_loader(batch_size=later), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert strategy.ledger.num_steps == strategy.plan.steps == 8 + 2 * 64 // later
    assert 1.98 <= strategy.epsilon() <= 2.0


def test_a_target_refuses_steps_beyond_the_plan(tmp_path: Path) -> None:
    class Extending(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.fit_loop.max_epochs = 3

    strategy = DPStrategy(target_epsilon=2.0, target_delta=1e-3, check_per_sample=False)
    with pytest.raises(PrivacyError, match="at most the 4 planned steps"):
        make_trainer(strategy, tmp_path, callbacks=[Extending()]).fit(Classifier(), make_loader())
    assert strategy.epsilon() <= 2.0


def test_shuffled_passes_cut_short_are_planned_one_by_one(tmp_path: Path) -> None:
    strategy = DPStrategy(target_epsilon=3.0, target_delta=1e-3, sampling="shuffle")
    trainer = make_trainer(strategy, tmp_path, max_epochs=6, limit_train_batches=2)
    trainer.fit(Classifier(), make_loader())
    assert sum(run.num_passes for run in strategy.ledger.entries) == 6
    assert 2.97 <= strategy.epsilon() <= 3.0
    budget = private(sampling="shuffle", noise_multiplier=3.0)
    make_trainer(budget, tmp_path, max_epochs=6, limit_train_batches=2, callbacks=[PrivacyBudget(2.0)]).fit(
        Classifier(), make_loader()
    )
    assert 0 < budget.epsilon() <= 2.0


@pytest.mark.parametrize("sampling", ["shuffle", "cyclic"])
def test_passes_that_hooks_cut_short_keep_target_and_budget(tmp_path: Path, sampling: Any) -> None:
    """One of four batches per pass: four times the passes that were planned."""

    class Cutting(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx else None

    limits: dict[str, Any] = {"max_epochs": -1, "max_steps": 6}
    strategy = DPStrategy(target_epsilon=3.0, target_delta=1e-3, check_per_sample=False, sampling=sampling)
    make_trainer(strategy, tmp_path, **limits).fit(Cutting(), make_loader())
    assert strategy.ledger.num_steps == sum(run.num_passes for run in strategy.ledger.entries) == 6
    assert 2.9 < strategy.epsilon() <= 3.0
    budget = private(sampling=sampling, noise_multiplier=1.5)
    trainer = make_trainer(budget, tmp_path, callbacks=[PrivacyBudget(2.5)], **limits)
    with pytest.raises(PrivacyError, match="where the privacy budget ends"):
        trainer.fit(Cutting(), make_loader())
    assert 1.5 < budget.epsilon() <= 2.5


@pytest.mark.parametrize("callbacks", [[], [PrivacyBudget(50.0)]])
@pytest.mark.one_in(2)
def test_unplanned_steps_are_refused_under_a_limit(tmp_path: Path, callbacks: list[Any]) -> None:
    class Thrice(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(3):
                super().training_step(batch, batch_idx)

    strategy = private() if callbacks else DPStrategy(target_epsilon=2.0, target_delta=1e-3, check_per_sample=False)
    with pytest.raises(PrivacyError, match="to step once per batch"):
        make_trainer(strategy, tmp_path, callbacks=callbacks).fit(Thrice(), make_loader())


def test_two_planned_optimizers_meet_a_target_exactly(tmp_path: Path) -> None:
    strategy = DPStrategy(target_epsilon=2.0, target_delta=1e-3, check_per_sample=False)
    make_trainer(strategy, tmp_path, max_epochs=2).fit(TwoOptimizers(), make_loader())
    assert 1.98 <= strategy.epsilon() <= 2.0
    assert strategy.ledger.entries[0].event.noise_multiplier == strategy.plan.noise_multiplier


def test_a_budget_binds_in_a_learning_rate_search(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.record(PrivacyEvent(kind="poisson", noise_multiplier=1.3, sample_rate=0.25), 10)
    budget = make_accountant("pld").epsilon(ledger, 1e-3)
    strategy = private()
    finder = LearningRateFinder(num_training_steps=40, update_attr=False, attr_name="lr")
    with pytest.raises(PrivacyError, match="stop after 10 steps"):
        make_trainer(strategy, tmp_path, max_epochs=20, callbacks=[PrivacyBudget(budget), finder]).fit(
            Classifier(), make_loader()
        )
    assert strategy.ledger.num_steps == 10
    assert math.isinf(strategy.last_allowed_step)
