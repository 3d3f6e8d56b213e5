"""``pytorch_lightning``: the same strategy and the same callbacks under the Trainers of the other package."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import (
    AdaptiveClipping,
    DPDDPStrategy,
    DPStrategy,
    EpsilonMonitor,
    GradientDiagnostics,
    NoiseScheduler,
    PrivacyBudget,
    PrivacyCard,
    PrivacyError,
    RandomSparsification,
)
from lightning_dp.strategies import _lightning
from tests.helpers import NUM_CLASSES, NUM_FEATURES, make_loader

pl: Any = pytest.importorskip("pytorch_lightning")


class Classifier(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, lr: float = 0.1, *, norm: bool = False, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.Tanh(), nn.Linear(16, NUM_CLASSES))
        if norm:
            self.network.insert(1, nn.BatchNorm1d(16))
        self.lr, self.automatic_optimization = lr, not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, labels = batch
        loss = nn.functional.cross_entropy(self.network(features), labels)
        self.log("nonprivate/loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def trainer_of(strategy: Any, path: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": path,
    }  # fmt: skip
    return pl.Trainer(strategy=strategy, **{**defaults, **options})


def callbacks() -> list[Any]:
    return [
        EpsilonMonitor(every_n_steps=1), PrivacyBudget(epsilon=100.0), PrivacyCard(), AdaptiveClipping(),
        NoiseScheduler("step", factor=0.9), RandomSparsification(final_rate=0.5), GradientDiagnostics(),
    ]  # fmt: skip


def test_strategy_and_callbacks_are_of_both_packages() -> None:
    for strategy in (DPStrategy(noise_multiplier=1.0), DPDDPStrategy(noise_multiplier=1.0)):
        assert isinstance(strategy, pl.strategies.Strategy)
    assert isinstance(DPDDPStrategy(noise_multiplier=1.0), pl.strategies.DDPStrategy)
    for callback in callbacks():
        assert isinstance(callback, pl.Callback)


@pytest.mark.slow
@pytest.mark.parametrize("manual", [False, True])
def test_modules_of_the_other_package_train_with_callbacks(manual: bool, tmp_path: Any) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, microbatch_size=7)
    trainer = trainer_of(strategy, tmp_path, callbacks=callbacks(), logger=logger, log_every_n_steps=1)
    trainer.fit(Classifier(manual=manual), make_loader(), make_loader())
    assert strategy.ledger.num_steps == trainer.global_step == 8
    assert "epsilon" in trainer.callback_metrics
    assert "nonprivate/loss" in strategy.nonprivate_logs
    assert list(tmp_path.rglob("privacy_card.json"))


def test_a_run_of_the_other_package_is_that_of_lightning(tmp_path: Any) -> None:
    """Same seed, same weights, whichever package runs the loop."""
    from tests.helpers import Classifier as Ours
    from tests.helpers import make_trainer

    class Same(Ours):
        def __init__(self) -> None:
            super().__init__()
            self.network = Classifier().network

    one, other = Same(), Classifier()
    make_trainer(DPStrategy(noise_multiplier=0.5, seed=3), tmp_path, max_epochs=2).fit(one, make_loader())
    trainer_of(DPStrategy(noise_multiplier=0.5, seed=3), tmp_path).fit(other, make_loader())
    torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_a_run_of_the_other_package_resumes_with_its_ledger(tmp_path: Any) -> None:
    first = trainer_of(DPStrategy(noise_multiplier=1.0, check_per_sample=False), tmp_path)
    first.fit(Classifier(), make_loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = trainer_of(DPStrategy(noise_multiplier=1.0), tmp_path, max_epochs=3)
    second.fit(Classifier(), make_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert second.strategy.ledger.num_steps == 12
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt")
    third = trainer_of(DPStrategy(noise_multiplier=1.0, check_per_sample=False), tmp_path)
    with pytest.warns(UserWarning, match="its 8 steps count towards epsilon here, too"):
        third.fit(loaded, make_loader())
    assert third.strategy.ledger.num_steps == 16


def test_what_is_refused_is_refused_in_the_other_package_too(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PrivacyError, match="BatchNorm1d"):
        trainer_of(DPStrategy(noise_multiplier=1.0), tmp_path).fit(Classifier(norm=True), make_loader())
    changing = [pl.callbacks.GradientAccumulationScheduler({1: 2})]
    strategy = DPStrategy(noise_multiplier=1.0)
    with caplog.at_level(logging.INFO):
        trainer_of(strategy, tmp_path, callbacks=changing, gradient_clip_val=0.1).fit(Classifier(), make_loader())
    assert [run.event.sample_rate for run in strategy.ledger.entries] == [0.25, 0.5]
    assert sum("acts on the private gradient" in r.getMessage() for r in caplog.records) == 1


def test_twins_are_found_by_their_name() -> None:
    import lightning.pytorch as ours

    assert _lightning.twin(ours.Callback) is pl.Callback
    assert _lightning.twin(ours.strategies.DDPStrategy) is pl.strategies.DDPStrategy
    assert _lightning.twin(int) is None
    assert _lightning.is_a(pl.callbacks.EarlyStopping("x"), ours.callbacks.EarlyStopping)
    assert not _lightning.is_a(pl.callbacks.EarlyStopping("x"), ours.callbacks.ModelCheckpoint)
