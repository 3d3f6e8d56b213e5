"""Copies and pickles of objects that a fit has changed, such as those among hyperparameters, work by themselves."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_dp import DPStrategy
from lightning_dp.strategies.overrides import Overrides
from tests.helpers import Classifier, make_loader, make_trainer


class Counter(Callback):
    """Counts batches."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1


class WithHyperparameters(Classifier):
    """Keeps the Trainer's arguments, as classes of forecasting packages do."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.save_hyperparameters(arguments)


def test_copies_have_the_owners_own_method() -> None:
    one, overrides = Counter(), Overrides()
    overrides.set(one, "on_train_batch_end", lambda *args: None)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        other.on_train_batch_end()
        assert (other.count, one.count) == (1, 0)


def test_copies_have_the_method_of_the_instance() -> None:
    one, overrides = Counter(), Overrides()
    one.on_train_batch_end = copy.copy  # type: ignore[method-assign,assignment]
    overrides.set(one, "on_train_batch_end", lambda *args: None)
    assert copy.deepcopy(one).on_train_batch_end is copy.copy
    overrides.undo()
    assert one.on_train_batch_end is copy.copy  # type: ignore[comparison-overlap]


def test_checkpoints_hold_the_trainers_arguments(tmp_path: Path) -> None:
    """The checkpoint in the middle of a fit holds settings and ledger, and neither weights nor sums of the fit."""
    strategy, counter = DPStrategy(noise_multiplier=1.3, check_per_sample=False), Counter()
    given = {
        "logger": CSVLogger(tmp_path),
        "callbacks": [counter, ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3)],
    }
    trainer = make_trainer(strategy, tmp_path, max_epochs=1, enable_checkpointing=True, **given)
    trainer.fit(WithHyperparameters(strategy=strategy, **given), make_loader())

    (path,) = (tmp_path / "saved").glob("*.ckpt")
    held = torch.load(path, weights_only=False)["hyper_parameters"]
    assert held["strategy"].settings == strategy.settings
    assert held["strategy"].ledger.num_steps == 3
    held["callbacks"][0].on_train_batch_end()
    assert held["callbacks"][0].count == 4

    trainer.save_checkpoint(tmp_path / "after.ckpt")
    after = torch.load(tmp_path / "after.ckpt", weights_only=False)["hyper_parameters"]["strategy"]
    assert after.ledger.num_steps == len(make_loader())

    again = make_trainer(held["strategy"], tmp_path, max_epochs=1)
    again.fit(Classifier(), make_loader())
    assert held["strategy"].ledger.num_steps == 3 + len(make_loader())


def test_pickles_of_a_fit_hold_nothing_of_the_records(tmp_path: Path) -> None:
    class Pickles(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            found: list[Any] = []

            class Reader(pickle.Pickler):
                def persistent_id(self, thing: Any) -> None:
                    if isinstance(thing, (torch.Tensor, torch.nn.Module)):
                        found.append(thing)

            Reader(io.BytesIO()).dump(trainer.strategy)
            counts.append(len(found))

    counts: list[int] = []
    strategy = DPStrategy(noise_multiplier=1.3, check_per_sample=False)
    make_trainer(strategy, tmp_path, max_epochs=1, callbacks=[Pickles()]).fit(Classifier(), make_loader())
    assert counts == [0] * len(make_loader())
