"""What user code writes out, reads back or decides between batches: checkpoints, logged figures, the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, MetricCollection

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, make_loader, make_trainer
from tests.strategies.test_after_release import Keeps
from tests.strategies.test_attacks import fit


def run(module: Any, tmp_path: Any, *callbacks: Any, data: Any = None, epochs: int = 2) -> DPStrategy:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    trainer = make_trainer(strategy, tmp_path, max_epochs=epochs, callbacks=list(callbacks))
    trainer.fit(module, **({"train_dataloaders": make_loader(32)} if data is None else {"datamodule": data}))
    return strategy


# ---------------------------------------------------------------- checkpoints


class Remembers(nn.Linear):
    """Saves a mean of its last inputs with its weights."""

    mean: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.detach().mean(0)
        return super().forward(x)

    def get_extra_state(self) -> Any:
        return {"mean": self.mean}

    def set_extra_state(self, state: Any) -> None:
        self.mean = state["mean"]


class Hyper(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"mean": 0.0})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.hparams["mean"] = float(batch[0].mean())
        return super().training_step(batch, batch_idx)


class Data(L.LightningDataModule):
    kept: Any = None

    def train_dataloader(self) -> Any:
        return make_loader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.kept = batch[0][:1].clone()
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}


class Collects(L.Callback):
    kept: Any = None

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kept = batch[0][:1].clone()


class CollectsState(Collects):
    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}


class CollectsOnSave(Collects):
    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept"] = self.kept


SAVED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "extra state": lambda: (Classifier(nn.Sequential(Remembers(NUM_FEATURES, NUM_CLASSES))),),
    "hyper-parameters": lambda: (Hyper(),),
    "callback's state": lambda: (Classifier(), CollectsState()),
    "callback's hook": lambda: (Classifier(), CollectsOnSave()),
}


@pytest.mark.parametrize("what", SAVED)
def test_records_in_a_checkpoint_are_refused(what: str, tmp_path: Any) -> None:
    module, *callbacks = SAVED[what]()
    with pytest.raises(PrivacyError, match=r"leaves .*(checkpoint|state_dict).* with another value after"):
        run(module, tmp_path, *callbacks)


def test_records_in_the_state_of_a_data_module_are_refused(tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=r"Data\.state_dict\(\).*kept"):
        run(Classifier(), tmp_path, data=Data())


@pytest.mark.slow
def test_a_callback_that_saves_the_clock_and_counts_is_free(tmp_path: Any) -> None:
    import time

    class Counts(L.Callback):
        count, kept = 0, torch.zeros(1)

        def on_train_batch_end(self, *args: Any) -> None:
            self.count, self.kept = self.count + 1, self.kept + 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count, "kept": self.kept, "seconds": time.perf_counter()}

    callback = Counts()
    assert run(Classifier(), tmp_path, callback).ledger.num_steps == callback.count == 4


def test_a_trial_writes_no_checkpoint(tmp_path: Path) -> None:
    written: list[bool] = []

    class Saves(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if self.trainer.strategy.is_on_trial:
                self.trainer.save_checkpoint(tmp_path / "trial.ckpt")
                written.append((tmp_path / "trial.ckpt").exists())
            return loss

    fit(Saves(), tmp_path)
    assert written
    assert not any(written)


# ---------------------------------------------------------------- figures that come back


class Plateau(Classifier):
    """Steps a scheduler by hand on the loss that training logged, or on one of validation."""

    def __init__(self, figure: str) -> None:
        super().__init__()
        self.automatic_optimization, self.figure = False, figure

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        self.log("loss", loss.detach(), on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step(self.trainer.callback_metrics[self.figure])

    def val_dataloader(self) -> Any:
        return make_loader()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)]


@pytest.mark.slow
def test_a_learning_rate_by_logged_figures_is_refused(tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=r"ReduceLROnPlateau\.best"):
        run(Plateau("loss"), tmp_path)
    assert run(Plateau("val_loss"), tmp_path).ledger.num_steps == 4


def test_figures_of_a_trial_stay_in_it(tmp_path: Any) -> None:
    seen: list[Any] = []

    class Looks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.trainer.strategy.is_on_trial:
                seen.append(dict(self.trainer.callback_metrics))
            self.log_dict({"loss": 7.0 if self.trainer.strategy.is_on_trial else 3.0})
            return super().training_step(batch, batch_idx)

    run(Looks(), tmp_path, epochs=1)
    assert [figures.get("loss", 3.0) for figures in seen] == [3.0] * 2


@pytest.mark.slow
def test_metrics_logged_together_are_not_copied(tmp_path: Any) -> None:
    """Also on trial, which does not read them."""

    class Collection(MetricCollection):
        def items(self, keep_base: bool = False, copy_state: bool = True) -> Any:
            assert not (copy_state and logging)
            return super().items(keep_base, copy_state)

    class Logs(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = Collection({"mean": MeanMetric(), "maximum": MaxMetric()})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.metrics.update(1.0)
            logging.append(True)
            self.log_dict(self.metrics, on_epoch=True)
            logging.clear()
            return loss

    logging: list[bool] = []
    assert run(Logs(), tmp_path, epochs=1).trainer.callback_metrics["mean"] == 1.0


# ---------------------------------------------------------------- hooks that see no batch


class Validates(Keeps):
    def val_dataloader(self) -> Any:
        return make_loader()


FAR = ["on_validation_start", "on_validation_epoch_end", "on_validation_end", "on_train_end"]


@pytest.mark.parametrize("of", ["module", "callback"])
@pytest.mark.parametrize("hook", FAR)
@pytest.mark.one_in(4)
def test_a_hook_far_from_batches_is_judged_once_it_writes(hook: str, of: str, tmp_path: Any) -> None:
    def write(module: Any) -> None:
        if module.kept is not None:
            module.network[0].weight.data[0] += module.kept

    kind = type("OfModule", (Validates,), {hook: write} if of == "module" else {})
    callback = type("Writes", (L.Callback,), {hook: lambda self, trainer, module: write(module)})()
    with pytest.raises(PrivacyError, match=r"network\.0\.weight' with another value"):
        run(kind(), tmp_path, *([callback] if of == "callback" else []))


@pytest.mark.slow
def test_weights_that_are_swapped_for_validation_are_free(tmp_path: Any) -> None:
    class Swaps(Validates):
        def __init__(self) -> None:
            super().__init__()
            self.average = [p.detach().clone() for p in self.network.parameters()]
            self.losses: list[Tensor] = []

        def on_validation_start(self) -> None:
            for parameter, other in zip(self.network.parameters(), self.average, strict=True):
                before = parameter.detach().clone()
                parameter.data.copy_(other)
                other.copy_(before)

        on_validation_end = on_validation_start

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.losses.append(nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def on_validation_epoch_end(self) -> None:
            assert torch.stack(self.losses).mean() > 0
            self.losses.clear()

    assert run(Swaps(), tmp_path).ledger.num_steps == 4


def test_hooks_on_trial_see_an_epoch_of_the_fit(tmp_path: Any) -> None:
    """A callback that writes at the end of training is judged after it, when the Trainer counts one epoch more."""

    class Averages(L.Callback):
        rates = (0.5, 0.25)

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            self.average = [p.detach().clone() for p in module.parameters()]

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            for kept, parameter in zip(self.average, module.parameters(), strict=True):
                kept.lerp_(parameter.detach(), self.rates[trainer.current_epoch])

        def on_train_end(self, trainer: Any, module: Any) -> None:
            assert trainer.current_epoch == 2 or trainer.strategy._fit.on_trial
            for kept, parameter in zip(self.average, module.parameters(), strict=True):
                parameter.data.copy_(kept)

    assert run(Classifier(), tmp_path, Averages()).ledger.num_steps == 4
