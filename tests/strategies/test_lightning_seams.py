"""Every private name of Lightning that the package touches still means what it takes it for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import Precision
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_dp.strategies import _lightning, _progress
from lightning_dp.strategies.outcomes import kept_outcomes
from lightning_dp.strategies.overrides import Overrides
from tests.helpers import ByHand, Classifier, make_loader, make_trainer


class Asking(L.Callback):
    """Runs a function in mid-fit, after each step."""

    def __init__(self, ask: Any) -> None:
        self.ask = ask
        self.answers: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.answers.append(self.ask(trainer))


def during_fit(tmp_path: Path, ask: Any, module: L.LightningModule | None = None, **options: Any) -> list[Any]:
    asking = Asking(ask)
    callbacks = [asking, *options.pop("callbacks", [])]
    make_trainer("auto", tmp_path, callbacks=callbacks, **options).fit(module or Classifier(), make_loader())
    return asking.answers


class Manual(ByHand, Classifier):
    """The classifier, stepping by itself."""


def test_batch_of_logs_weighs_a_mean(tmp_path: Path) -> None:
    """Two values, of weights 1 and 3."""

    class Logging(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            _lightning.set_batch_of_logs(self.trainer, batch, 1 if batch_idx == 0 else 3)
            self.log("value", float(batch_idx), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = make_trainer("auto", tmp_path, limit_train_batches=2)
    trainer.fit(Logging(), make_loader())
    assert float(trainer.callback_metrics["value"]) == pytest.approx(3 / 4)


def test_fit_results_hold_what_is_logged(tmp_path: Path) -> None:
    class Logging(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("value", 1.0)
            return super().training_step(batch, batch_idx)

    names = during_fit(tmp_path, lambda trainer: [*_lightning.fit_results(trainer)], Logging())
    assert all(any("value" in name for name in found) for found in names)


def test_logger_step_counts_batches_that_stepped(tmp_path: Path) -> None:
    assert during_fit(tmp_path, _lightning.logger_step, max_epochs=2) == list(range(8))
    assert during_fit(tmp_path, _lightning.logger_step, accumulate_grad_batches=2) == [0, 0, 1, 1]


def test_is_saved_by_steps_follows_the_interval(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    options = {"callbacks": [saving], "enable_checkpointing": True}
    assert during_fit(tmp_path, _lightning.is_saved_by_steps, **options) == [False, False, True, False]
    assert during_fit(tmp_path, _lightning.is_saved_by_steps) == [False] * 4


def test_transfer_hook_is_replaced_and_restored(tmp_path: Path) -> None:
    class Doubling(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

    module = Doubling()
    trainer = make_trainer("auto", tmp_path)
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, train_dataloaders=make_loader())
    batch = (torch.ones(2, 6), torch.zeros(2))
    assert bool((_lightning.apply_transfer_hook(module, batch)[0] == 2).all())
    overrides = Overrides()
    _lightning.replace_transfer_hook(overrides, module, lambda given: given is batch)
    assert module._on_before_batch_transfer(batch, 0) is batch
    assert bool((module._on_before_batch_transfer((torch.ones(1, 6), torch.ones(1)), 0)[0] == 2).all())
    overrides.undo()
    assert bool((module._on_before_batch_transfer(batch, 0)[0] == 2).all())


def test_lightning_optimizers_are_those_of_manual_optimization(tmp_path: Path) -> None:
    def same(trainer: L.Trainer) -> bool:
        (wrapper,) = _lightning.lightning_optimizers(trainer.strategy)
        return wrapper is trainer.lightning_module.optimizers() and wrapper.optimizer is trainer.optimizers[0]

    assert during_fit(tmp_path, same, Manual()) == [True] * 4


@pytest.mark.parametrize("quiet", [True, False])
def test_a_counted_step_shows_in_global_step_alone(tmp_path: Path, quiet: bool) -> None:
    class Twice(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            if quiet:
                with _progress.counting(optimizer, self.trainer):
                    optimizer.step()
            else:
                optimizer.step()

    def counted(trainer: L.Trainer) -> tuple[int, int]:
        return trainer.global_step, trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.ready

    assert during_fit(tmp_path, counted, Twice())[-1] == (8, 4 if quiet else 8)


def test_completed_steps_are_behind_global_step(tmp_path: Path) -> None:
    def put_back(trainer: L.Trainer) -> int:
        _progress.set_counters(trainer, [0])
        return trainer.global_step

    assert during_fit(tmp_path, put_back, Manual()) == [0] * 4
    assert during_fit(tmp_path, put_back, Classifier()) == [0] * 4


def test_loader_states_are_dropped_from_a_checkpoint(tmp_path: Path) -> None:
    class Stateful(torch.utils.data.DataLoader):
        def state_dict(self) -> dict[str, int]:
            return {"position": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise AssertionError(state)

    found: list[tuple[bool, bool]] = []

    class Saving(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            states = checkpoint["loops"]["fit_loop"]["state_dict"]
            before = "combined_loader" in states
            _lightning.drop_loader_states(checkpoint)
            found.append((before, "combined_loader" in states))

    trainer = make_trainer("auto", tmp_path, callbacks=[Saving()])
    trainer.fit(Classifier(), Stateful(make_loader().dataset, batch_size=16))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert found == [(True, False)]
    _lightning.drop_loader_states({})


def test_is_searching_learning_rate_during_the_search_only(tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    found = during_fit(tmp_path, _lightning.is_searching_learning_rate, callbacks=[finder])
    assert found[-4:] == [False] * 4
    assert not any(found[-4:])
    assert during_fit(tmp_path, _lightning.is_searching_learning_rate) == [False] * 4


def test_is_fitting_holds_within_a_fit_only(tmp_path: Path) -> None:
    module = Classifier()
    assert not _lightning.is_fitting(None)
    assert not _lightning.is_fitting(module)
    trainer = make_trainer("auto", tmp_path)
    trainer.fit(module, make_loader())
    assert _lightning.is_fitting(module)
    trainer.validate(module, make_loader(), verbose=False)
    assert not _lightning.is_fitting(module)


def test_is_search_knows_searches_and_their_subclasses() -> None:
    subclass = type("Mine", (BatchSizeFinder,), {})
    assert [_lightning.is_search(each) for each in (LearningRateFinder(), subclass(), ModelCheckpoint())] == [
        True,
        True,
        False,
    ]


def test_launchers_are_read_and_set() -> None:
    strategy = DDPStrategy(start_method="spawn", parallel_devices=[torch.device("cpu")])
    assert _lightning.launcher_of(strategy) is None
    launcher = _lightning.MultiProcessingLauncher(strategy, start_method="spawn")
    _lightning.set_launcher(strategy, launcher)
    assert _lightning.launcher_of(strategy) is strategy.launcher is launcher
    assert _lightning.start_method(launcher) == "spawn"


def test_backward_without_fabric_is_allowed_within() -> None:
    class Scaling(Precision):
        def backward(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError(args)

    fabric = Fabric(accelerator="cpu", devices=1, plugins=[Scaling()])
    module = fabric.setup(nn.Linear(2, 1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"requires you to call `fabric\.backward"):
            module(torch.ones(1, 2)).sum().backward()
        with _lightning.in_fabric_backward():
            module(torch.ones(1, 2)).sum().backward()


def test_wrap_checkpoint_io_puts_the_writer_inside() -> None:
    writer, own = TorchCheckpointIO(), TorchCheckpointIO()
    assert _lightning.wrap_checkpoint_io(None, lambda: writer) is writer
    assert _lightning.wrap_checkpoint_io(own, lambda: writer) is own
    wrapper = AsyncCheckpointIO()
    assert _lightning.wrap_checkpoint_io(wrapper, lambda: writer) is wrapper
    assert wrapper.checkpoint_io is writer
    taken = AsyncCheckpointIO(own)
    _lightning.wrap_checkpoint_io(taken, lambda: writer)
    assert taken.checkpoint_io is own


def test_loaded_checkpoints_are_shown_with_their_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load: Any = _lightning.saving._load_state
    monkeypatch.setattr(load, "notes", [*load.notes])  # put back afterwards
    monkeypatch.setattr(_lightning, "_NOTES", [])
    trainer = make_trainer("auto", tmp_path)
    trainer.fit(Classifier(), make_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    shown: list[tuple[Any, int]] = []
    _lightning.note_loaded_checkpoints(lambda module, checkpoint: shown.append((module, checkpoint["global_step"])))
    module = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert shown == [(module, 4)]


def test_kept_outcomes_puts_figures_and_ends_back(tmp_path: Path) -> None:
    trainer = make_trainer("auto", tmp_path)
    stores = _lightning.figures(trainer)
    assert stores[0] is trainer.callback_metrics
    stores[0]["before"] = 1.0
    with kept_outcomes(trainer):
        trainer.should_stop = True
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_batches = 99, 99, 99
        for store in _lightning.figures(trainer):
            store["within"] = 2.0
        assert trainer.callback_metrics["within"] == 2.0
    assert (stores[0], stores[1], trainer.should_stop) == ({"before": 1.0}, {}, False)
    assert trainer.callback_metrics is stores[0]
    assert 99 not in (trainer.max_epochs, trainer.max_steps, trainer.num_training_batches)


def test_is_overridden_follows_a_class_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also an attribute of one instance; methods of Lightning and of this package are nobody's own."""

    class Own(Classifier):
        pass

    module, callback = Own(), L.pytorch.callbacks.LambdaCallback(on_train_end=print)
    for _ in range(2):
        assert not _lightning.is_overridden("backward", module)
        with monkeypatch.context() as patch:
            patch.setattr(Own, "backward", lambda self, loss: loss.backward())
            assert _lightning.is_overridden("backward", module)
    module.backward = print
    assert _lightning.is_overridden("backward", module)
    assert _lightning.is_overridden("on_train_end", callback)
    assert not _lightning.is_overridden("on_train_start", callback)
    assert not _lightning.is_overridden("backward", torch.nn.Linear(1, 1))
