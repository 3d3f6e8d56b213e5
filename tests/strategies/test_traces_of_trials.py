"""Trials leave no trace: in attributes, classes, outputs, figures, experiments and loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from lightning_dp import PrivacyError
from tests.helpers import Classifier, make_loader, make_trainer
from tests.strategies.test_habits import private


@pytest.mark.slow
def test_own_attributes_of_instances_are_put_back(tmp_path: Path) -> None:
    """A user's own replacements of methods, on an optimizer, a logger and the module, outlive a fit."""
    optimizers: list[torch.optim.Optimizer] = []
    called: list[str] = []

    class Own(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            plain = optimizer.zero_grad
            optimizer.zero_grad = lambda *args, **kwargs: (called.append("zero_grad"), plain(*args, **kwargs))[1]
            optimizers.append(optimizer)
            return optimizer

    logger = CSVLogger(tmp_path)
    logger.log_metrics = own = lambda metrics, step=None: called.append("log_metrics")  # type: ignore[method-assign]
    module = Own()
    make_trainer(private(), tmp_path, logger=logger, log_every_n_steps=1).fit(module, make_loader())
    assert "zero_grad" in called
    assert vars(logger)["log_metrics"] is own
    called.clear()
    optimizers[0].zero_grad()
    assert called == ["zero_grad"]
    assert "clip_gradients" not in vars(module)


def test_lists_and_counters_of_a_class_hold_real_steps(tmp_path: Path) -> None:
    """Also of a helper's class, where each record runs alone, and where a step adds the attribute."""

    class Meter:
        sizes: list[int] = []  # noqa: RUF012, as users write it

    class Collecting(Classifier):
        losses: list[Tensor] = []  # noqa: RUF012
        count = 0

        def __init__(self) -> None:
            super().__init__()
            self.meter = Meter()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.losses.append(loss.detach())
            self.meter.sizes.append(len(batch[0]))
            type(self).count += 1
            type(self).late = getattr(self, "late", 0) + 1  # type: ignore[attr-defined]
            return loss

    module = Collecting()
    make_trainer(private(grad_sample="single"), tmp_path).fit(module, make_loader())
    assert len(module.losses) == len(Meter.sizes) == module.count == module.late == 4


@pytest.mark.parametrize("by_callback", [False, True])
@pytest.mark.one_in(2)
def test_outputs_are_collected_from_epoch_to_epoch(by_callback: bool, tmp_path: Path) -> None:
    """In a list that does not exist before the first epoch, as Lightning 2 advises."""

    def begin(module: Any) -> None:
        module.outputs = []

    class Begins(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            begin(pl_module)

    class Collecting(Classifier):
        def on_train_epoch_start(self) -> None:
            if not by_callback:
                begin(self)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.outputs.append(loss.detach())
            return loss

        def on_train_epoch_end(self) -> None:
            self.log("mean", torch.stack(self.outputs).mean())

    module, callbacks = Collecting(), [Begins()] if by_callback else []
    make_trainer(private(), tmp_path, max_epochs=2, callbacks=callbacks).fit(module, make_loader(32))
    assert len(module.outputs) == 2


def test_runs_of_a_trial_do_not_see_each_others_figures(tmp_path: Path) -> None:
    """Else checks would not try the branch of the first step; the second batch of a run sees those of the first."""
    known: list[tuple[bool, int]] = []
    real: list[bool] = []

    class Reads(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not self.trainer.strategy._fit.on_trial:
                real.append("own" in self.trainer.callback_metrics)
            known.append(("own" in self.trainer.callback_metrics, len(batch[0])))
            self.log("own", 1.0)
            return super().training_step(batch, batch_idx)

    make_trainer(private(), tmp_path, max_steps=1).fit(Reads(), make_loader())
    assert real == [False]
    assert {size for seen, size in known if not seen} == {size for _, size in known}
    assert any(seen for seen, _ in known)


def test_trials_write_nothing_to_experiments(tmp_path: Path) -> None:
    """Also where each record runs alone: one entry per step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, table = TensorBoardLogger(tmp_path), CSVLogger(tmp_path)

    class Draws(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            first, second = self.loggers
            assert isinstance(first, TensorBoardLogger)
            assert str(tmp_path) in first.experiment.get_logdir()
            first.experiment.add_scalar("mine", 1.0, self.global_step)
            second.experiment.log_metrics({"mine": 1.0}, step=self.global_step)
            second.log_graph(self)
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(private(grad_sample="single"), tmp_path, logger=[board, table])
    trainer.fit(Draws(), make_loader())
    assert trainer.loggers == [board, table]
    read = EventAccumulator(board.log_dir).Reload()
    assert [event.step for event in read.Scalars("mine")] == [0, 1, 2, 3]
    rows = Path(table.log_dir, "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 4


def test_a_logger_of_the_users_own_class_is_seen_on_trial(tmp_path: Path) -> None:
    """What its methods keep may reach a later loss."""

    class Memory(CSVLogger):
        last = torch.tensor(1.0)

        def remember(self, value: Tensor) -> None:
            self.last = value

    class Reads(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx) * self.logger.last
            self.logger.remember(batch[0].mean().abs())
            return loss

    with pytest.raises(PrivacyError, match="changes with what training_step saw before"):
        make_trainer(private(), tmp_path, logger=Memory(tmp_path)).fit(Reads(), make_loader())
