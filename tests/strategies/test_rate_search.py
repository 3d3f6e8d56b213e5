"""The search for a learning rate spends budget, which stays counted."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lightning_dp import PrivacyBudget, PrivacyError
from tests.helpers import Classifier, make_loader, make_trainer
from tests.strategies.test_modes import strategy_of, targeted


def test_learning_rate_search_spends_budget_that_stays_counted(tmp_path: Any) -> None:
    class Tunable(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"lr": 0.1})

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    strategy = strategy_of()
    trainer = make_trainer(strategy, tmp_path, max_epochs=2)
    module = Tunable()
    Tuner(trainer).lr_find(module, make_loader(), num_training=6, attr_name="lr", update_attr=False)
    searched = strategy.ledger.num_steps
    assert searched >= 6
    trainer.fit(module, make_loader())
    assert strategy.ledger.num_steps == searched + 8


class Again(LearningRateFinder):
    """Searches at the beginning of every epoch, as Lightning's documentation does."""

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("callbacks", [[], [PrivacyBudget(2.0)]])
def test_searches_within_a_run_keep_its_limit(callbacks: list[Any], tmp_path: Any) -> None:
    strategy = strategy_of() if callbacks else targeted()
    finder = Again(num_training_steps=3, early_stop_threshold=None, update_attr=False)
    make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[finder, *callbacks]).fit(Classifier(), make_loader())
    assert strategy.ledger.num_steps > strategy.steps_taken > 0
    assert 1.5 < strategy.epsilon() <= 2.0


def test_a_checkpoint_loaded_after_the_last_step_is_reported(tmp_path: Any) -> None:
    class Back(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            trainer.strategy.load_checkpoint(tmp_path / "last.ckpt", weights_only=True)

    strategy = strategy_of()
    make_trainer(strategy, tmp_path, enable_checkpointing=True, callbacks=[Back()]).fit(Classifier(), make_loader())
    assert "4 steps" in strategy.state.summary_line()


@pytest.mark.slow
def test_learning_rate_search_within_a_run_is_not_tried(tmp_path: Any) -> None:
    module, strategy = Classifier(), strategy_of()
    finder = Again(num_training_steps=6, early_stop_threshold=None)
    make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[finder]).fit(module, make_loader())
    assert strategy.ledger.num_steps >= 6 + 2 * 4


def test_batch_hooks_of_a_search_are_watched(tmp_path: Any) -> None:
    class Keeping(LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            pass

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            pl_module.network[0].bias.data.fill_(batch[0].sum())

    trainer = make_trainer(strategy_of(check_per_sample=True), tmp_path, max_epochs=1, callbacks=[Keeping()])
    with pytest.raises(PrivacyError, match="bias"):
        trainer.fit(Classifier(), make_loader())


def test_learning_rate_search_and_run_share_one_target(tmp_path: Any) -> None:
    strategy = targeted()
    trainer = make_trainer(strategy, tmp_path, max_epochs=2)
    module = Classifier()
    Tuner(trainer).lr_find(module, make_loader(), num_training=6, attr_name="lr", update_attr=False)
    assert 0 < strategy.epsilon() < 2.0
    trainer.fit(module, make_loader())
    assert 1.98 <= strategy.epsilon() <= 2.0
