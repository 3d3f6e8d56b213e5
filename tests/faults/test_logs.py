"""What logs leak: named in the privacy statement, and dropped under ``strict_logging`` (I6)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from lightning_dp import DPDDPStrategy, DPStrategy, Epsilon, EpsilonMonitor
from lightning_dp.callbacks import GradientDiagnostics
from tests.helpers import Classifier, make_loader, make_trainer

pytestmark = pytest.mark.usefixtures("no_picture")

LEAKS = {"train_loss", "accuracy", "in_dict", "after_batch", "after_epoch", "by_callback", "direct"}
NAMED = {"nonprivate/loss", "nonprivate/direct"}
OURS = {"epsilon", "privacy/delta", "privacy/noise_multiplier", "eps_metric"}
ALLOWED = {"val_loss", "lr-SGD", "epoch", "step"}


class Talkative(Classifier):
    """Logs the training data in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.MeanMetric()

    def setup(self, stage: str) -> None:
        self.spent = Epsilon(self.trainer.strategy, delta=1e-5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("nonprivate/loss", loss, prog_bar=True)
        self.log_dict({"in_dict": loss * 2}, prog_bar=True)
        self.accuracy(loss.detach())
        self.log("accuracy", self.accuracy)
        self.log("eps_metric", self.spent, on_step=False, on_epoch=True)
        for logger in self.trainer.loggers:
            logger.log_metrics({"direct": loss.item(), "nonprivate/direct": loss.item()}, step=self.global_step)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("after_batch", batch[0].sum(), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self.log("after_epoch", self.accuracy.compute(), prog_bar=True)


class Reporter(L.Callback):
    """Logs from outside the module, and keeps what was shown at each step."""

    def __init__(self) -> None:
        self.shown: set[str] = set()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.log("by_callback", batch[0].sum(), prog_bar=True)
        shown = (trainer.progress_bar_metrics, trainer.callback_metrics, trainer.logged_metrics)
        self.shown |= {name for metrics in shown for name in metrics}


def shown_by(tmp_path: Path, strategy: Any, **options: Any) -> tuple[set[str], L.Trainer]:
    """Names in the logger's file, on the progress bar, in callback_metrics and in logged_metrics, at any time."""
    reporter, logger = Reporter(), CSVLogger(tmp_path)
    trainer = make_trainer(
        strategy,
        tmp_path,
        callbacks=[EpsilonMonitor(every_n_steps=1), LearningRateMonitor("step"), reporter],
        logger=logger,
        log_every_n_steps=1,
        **options,
    )
    validation = torch.utils.data.DataLoader(make_loader().dataset, batch_size=32)
    trainer.fit(Talkative(), make_loader(32), validation)
    shown = reporter.shown | trainer.progress_bar_metrics.keys() | trainer.callback_metrics.keys()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    shown |= {name for row in rows for name, value in row.items() if value}
    return {name.removesuffix("_step").removesuffix("_epoch") if "loss" in name else name for name in shown}, trainer


def make(name: str, **options: Any) -> Any:
    strategy = {"single": DPStrategy, "ddp": DPDDPStrategy}[name]
    return strategy(noise_multiplier=1.3, target_delta=1e-5, **options)


@pytest.mark.slow
def test_strict_logging_drops_unnamed_training_figures(tmp_path: Path) -> None:
    shown, trainer = shown_by(tmp_path, make("single", strict_logging=True))
    assert not shown & LEAKS
    assert shown == NAMED | OURS | ALLOWED
    assert trainer.strategy.nonprivate_logs == NAMED
    statement = trainer.strategy.privacy_statement()
    assert "logged without noise: nonprivate/direct, nonprivate/loss" in statement
    assert "train_loss" not in statement


@pytest.mark.slow
def test_statement_names_everything_that_was_logged(tmp_path: Path) -> None:
    shown, trainer = shown_by(tmp_path, make("single"))
    assert shown == LEAKS | NAMED | OURS | ALLOWED
    assert trainer.strategy.nonprivate_logs == LEAKS | NAMED
    listed = ", ".join(sorted(LEAKS | NAMED))
    assert f"logged without noise: {listed}" in trainer.strategy.privacy_statement()


def test_the_two_process_strategy_takes_it_too() -> None:
    assert make("ddp", strict_logging=True).settings.strict_logging
    with pytest.raises(TypeError, match="strict_logging to be True or False, got strict_logging=1"):
        make("ddp", strict_logging=1)


def test_diagnostics_that_were_asked_for_by_name_stay(tmp_path: Path) -> None:
    strategy = make("single", strict_logging=True)
    trainer = make_trainer(strategy, tmp_path, callbacks=[GradientDiagnostics()])
    trainer.fit(Classifier(), make_loader())
    assert "nonprivate/clip_fraction" in trainer.callback_metrics
    assert "nonprivate/clip_fraction" in strategy.privacy_statement()


class ByKeyword(CSVLogger):
    def log_metrics(self, *, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)


class OtherNames(CSVLogger):
    """Takes the step first, and anything else."""

    def log_metrics(self, step: int = 0, metrics: Any = None, *more: Any, **others: Any) -> None:  # type: ignore[override]
        super().log_metrics(metrics, step)


class Positional(CSVLogger):
    def log_metrics(self, metrics: Any, step: Any = None, /) -> None:
        super().log_metrics(metrics, step)


CALLS = {
    ByKeyword: lambda logger, values: logger.log_metrics(metrics=values, step=0),
    OtherNames: lambda logger, values: logger.log_metrics(0, values),
    Positional: lambda logger, values: logger.log_metrics(values, 0),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make_logger", CALLS)
@pytest.mark.one_in(6)
def test_loggers_of_any_signature_are_watched(make_logger: Any, strict: bool, tmp_path: Path) -> None:
    call = CALLS[make_logger]

    class Direct(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            call(self.logger, {"direct": 1.0, "nonprivate/direct": 2.0})
            return super().training_step(batch, batch_idx)

    logger = make_logger(tmp_path)
    strategy = make("single", strict_logging=strict)
    callbacks = [EpsilonMonitor(every_n_steps=1)] if make_logger is ByKeyword else []
    make_trainer(strategy, tmp_path, logger=logger, callbacks=callbacks).fit(Direct(), make_loader())
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        columns = set(next(csv.reader(file)))
    assert "nonprivate/direct" in columns
    assert ("direct" in columns) == (not strict)
    assert ("epsilon" in columns) == bool(callbacks)
    assert strategy.nonprivate_logs == ({"nonprivate/direct"} if strict else {"direct", "nonprivate/direct"})


def test_nothing_is_left_on_the_trainer_afterwards(tmp_path: Path) -> None:
    """The next fit of this Trainer, the next user of this logger: both as Lightning made them."""
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(make("single", strict_logging=True), tmp_path, logger=logger)
    trainer.fit(Classifier(), make_loader())
    assert "log_metrics" not in logger.__dict__
    assert "log" not in trainer.fit_loop.epoch_loop._results.__dict__
