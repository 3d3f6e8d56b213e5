"""Runs with correlated noise that resume, end early or begin again."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from torch.utils.data import DataLoader

from lightning_dp import (
    CorrelatedNoise,
    PrivacyError,
)
from tests.helpers import Classifier, make_loader, make_trainer
from tests.strategies.test_correlated import STREAMS, Nothing, Stream, make_strategy, released


def test_a_run_resumes_between_passes_and_costs_as_much(tmp_path: Any) -> None:
    """The interrupted and the uninterrupted run are one Gaussian each; a longer one, or one in mid-pass, is refused."""
    fits = []
    for epochs, resume in ((4, None), (2, None), (4, tmp_path / "2.ckpt")):
        strategy = make_strategy(noise=CorrelatedNoise())
        # the run is planned for 4 passes, and one is stopped after 2 of them
        stop = Stop(epochs, tmp_path / f"{epochs}.ckpt")
        trainer = make_trainer(strategy, tmp_path, max_epochs=4, callbacks=[stop])
        trainer.fit(Classifier(), make_loader(), ckpt_path=resume, weights_only=True if resume else None)
        fits.append(strategy)
    whole, stopped, resumed = fits
    assert [each.ledger.num_steps for each in fits] == [16, 8, 16]
    assert whole.epsilon() == stopped.epsilon() == resumed.epsilon()
    assert resumed.ledger.mechanisms() == {(1.0, 1.0, 1): 1}
    assert resumed.plan.correlation == stopped.plan.correlation


class Stop(L.Callback):
    """Saves a checkpoint after some epochs, and ends the run."""

    def __init__(self, epochs: float, path: Any) -> None:
        self.steps, self.path = 4 * epochs, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("stopped", "epochs", "options", "match"),
    [
        (2, 5, {}, "Expected correlation=.* as in the run being resumed"),
        (2, 4, {"noise_multiplier": 2.0}, "Expected noise_multiplier=1.0 as in the run being resumed"),
        (1.5, 4, {}, "the secret assignment of that pass ended"),
    ],
    ids=["longer", "other noise", "within a pass"],
)
def test_a_run_that_cannot_go_on_is_refused(
    tmp_path: Any, stopped: float, epochs: int, options: Any, match: str
) -> None:
    path = tmp_path / "stopped.ckpt"
    make_trainer(make_strategy(), tmp_path, max_epochs=4, callbacks=[Stop(stopped, path)]).fit(
        Classifier(), make_loader()
    )
    trainer = make_trainer(make_strategy(**options), tmp_path, max_epochs=epochs)
    with pytest.raises(PrivacyError, match=match):
        trainer.fit(Classifier(), make_loader(), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("how", ["in a second fit", "within a fit"])
def test_a_run_whose_batches_change_is_refused(how: str, tmp_path: Any) -> None:
    """Under a public assignment: records would come back sooner, and noise be cancelled at another scale."""

    class Growing(Nothing):
        sizes = iter((16, 32))

        def train_dataloader(self) -> Any:
            return make_loader(batch_size=next(self.sizes))

    strategy, module = make_strategy(neighboring_relation="zero_out"), Growing()
    if how == "within a fit":
        trainer = make_trainer(strategy, tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    else:
        stop = Stop(0.5, tmp_path / "half.ckpt")
        trainer = make_trainer(strategy, tmp_path, max_epochs=-1, max_steps=4, callbacks=[stop])
        trainer.fit(module)
        trainer.should_stop = False
    with pytest.raises(PrivacyError, match=r"Expected correlation=.* as in the run being resumed"):
        trainer.fit(module)
    assert strategy.ledger.num_steps == (4 if how == "within a fit" else 2)


@STREAMS
def test_a_stream_with_other_workers_does_not_resume(tmp_path: Any) -> None:
    """Workers take turns, so the records of a batch would be others: one could be used twice in a pass."""
    options = {"sampling": "shuffle", "neighboring_relation": "zero_out", "fixed_order": True}
    stop = Stop(0.25, path := tmp_path / "stopped.ckpt")
    loaders = [DataLoader(Stream(), batch_size=16, num_workers=workers) for workers in (0, 1)]
    trainer = make_trainer(make_strategy(**options), tmp_path, callbacks=[stop])
    trainer.fit(Classifier(), loaders[0])
    trainer = make_trainer(make_strategy(**options), tmp_path)
    with pytest.raises(PrivacyError, match=r"Expected correlation=.*\[16, 0, 1\].*, got .*\[16, 1, 1\]"):
        trainer.fit(Classifier(), loaders[1], ckpt_path=path, weights_only=True)


def test_a_second_release_of_a_batch_is_refused(tmp_path: Any) -> None:
    """Its records would count at two steps in a row, which the next step alone would find out of place."""

    class Twice(Classifier):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            optimizer.step()

    strategy = make_strategy()
    with pytest.raises(PrivacyError, match="Expected each private optimizer to step once per batch"):
        make_trainer(strategy, tmp_path, max_steps=2).fit(Twice(), make_loader())
    assert strategy.ledger.mechanisms() == {(1.0, 1.0, 1): 1}


def test_a_public_assignment_resumes_within_a_pass(tmp_path: Any) -> None:
    public = {"neighboring_relation": "zero_out"}
    stop = Stop(1.5, path := tmp_path / "stopped.ckpt")
    make_trainer(make_strategy(**public), tmp_path, max_epochs=4, callbacks=[stop]).fit(Classifier(), make_loader())
    strategy = make_strategy(**public)
    trainer = make_trainer(strategy, tmp_path, max_epochs=4)
    trainer.fit(Classifier(), make_loader(), ckpt_path=path, weights_only=True)
    assert strategy.ledger.num_steps == 16
    assert strategy.ledger.mechanisms() == {(1.0, 1.0, 1): 1}


def test_a_second_fit_is_a_second_run(tmp_path: Any) -> None:
    """Also if the first one was stopped half-way, so that its event has steps left."""
    strategy = make_strategy()
    for _ in range(2):
        stop = Stop(1, tmp_path / "half.ckpt")
        make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[stop]).fit(Classifier(), make_loader())
    assert strategy.ledger.num_steps == 8
    assert strategy.ledger.mechanisms() == {(1.0, 1.0, 1): 2}


class Save(Stop):
    """Saves a checkpoint after some epochs."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)


def test_steps_that_are_taken_again_cost_a_second_event(tmp_path: Any) -> None:
    """Two of four passes, then two again from a checkpoint after the first: the second one has run twice."""
    strategy, path = make_strategy(), tmp_path / "first.ckpt"
    for stop, resume in ((2, None), (3, path)):
        callbacks = [Save(1, path), Stop(stop, tmp_path / "end.ckpt")]
        trainer = make_trainer(strategy, tmp_path, max_epochs=4, callbacks=callbacks)
        trainer.fit(Classifier(), make_loader(), ckpt_path=resume, weights_only=True if resume else None)
    assert strategy.ledger.num_steps == strategy.plan.correlation.steps == 16
    assert strategy.ledger.mechanisms() == {(1.0, 1.0, 1): 2}


@STREAMS
def test_a_pass_that_is_cut_short_begins_the_stream_again(tmp_path: Any) -> None:
    """2 of 4 batches per pass: a record comes back after 2 steps, and batch 0 after batch 1."""
    strategy = make_strategy(sampling="shuffle", neighboring_relation="zero_out", fixed_order=True)
    released(strategy, tmp_path, loader=DataLoader(Stream(), batch_size=16), limit_train_batches=2)
    known = strategy.plan.correlation
    assert (known.steps, known.separation, known.passes) == (8, 2, 4)
    assert strategy.ledger.num_steps == 8


def test_a_loader_that_is_made_again_is_refused(tmp_path: Any) -> None:
    class Reloading(Nothing):
        def train_dataloader(self) -> Any:
            return make_loader()

    trainer = make_trainer(make_strategy(), tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(PrivacyError, match="The training loader was made again during a run with correlated noise"):
        trainer.fit(Reloading())
