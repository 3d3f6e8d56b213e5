"""Epsilon as a torchmetrics Metric."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.context import set_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_dp import DPStrategy, Epsilon, Ledger, PrivacyError, PrivacyEvent
from tests.helpers import Classifier, make_loader, make_trainer
from tests.spawned_metric import Run, follow


def test_epsilon_reads_the_ledger_and_reset_leaves_it(tmp_path: Any) -> None:
    ledger = Ledger()
    metric = Epsilon(ledger, delta=1e-5, accountant="gdp")
    assert math.isnan(metric.compute())
    ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
    metric.reset()
    assert float(metric.compute()) == pytest.approx(4.377178, abs=1e-5)
    metric.reset()
    ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
    assert float(metric.compute()) > 4.4
    assert ledger.num_steps == 2


def test_epsilon_logged_as_a_metric_object_survives_the_epochs(tmp_path: Any) -> None:
    """Lightning resets a logged Metric every epoch; epsilon must go on growing."""
    strategy = DPStrategy(noise_multiplier=1.3, target_delta=1e-5, accountant="rdp", check_per_sample=False)
    ends: list[float] = []

    class Logging(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.epsilon = Epsilon(strategy, delta=1e-5)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("epsilon", self.epsilon, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            ends.append(float(self.epsilon.compute()))

    make_trainer(strategy, tmp_path, max_epochs=3).fit(Logging(), make_loader(batch_size=32))
    assert ends[0] < ends[1] < ends[2]
    assert ends[2] == pytest.approx(strategy.epsilon())


def test_epsilon_computed_twice_is_that_of_now() -> None:
    """A Metric keeps what it has computed until its next update, which this one never gets."""
    ledger = Ledger()
    metric = Epsilon(ledger, delta=1e-5, accountant="gdp", compute_with_cache=True)
    ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
    before = float(metric.compute())
    ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
    assert float(metric.compute()) > before + 1.0


def test_epsilon_refuses_what_is_no_ledger() -> None:
    with pytest.raises(TypeError, match="private strategy or a Ledger, got Tensor"):
        Epsilon(torch.ones(1), delta=1e-5)
    with pytest.raises(ValueError, match="0 < delta < 1"):
        Epsilon(Ledger(), delta=1.0)


class Holder(nn.Module):
    """A module with the metric in it."""

    def __init__(self, metric: Epsilon) -> None:
        super().__init__()
        self.metric, self.layer = metric, nn.Linear(1, 1)


COPIES: dict[str, Callable[[Epsilon], Any]] = {
    "clone": lambda metric: metric.clone(),
    "collection": lambda metric: MetricCollection({"epsilon": metric, "mean": MeanMetric()}).clone(prefix="val_")[
        "epsilon"
    ],
    "deepcopy": copy.deepcopy,
    "module": lambda metric: copy.deepcopy(Holder(metric)).metric,
    "copy_of_a_copy": lambda metric: copy.deepcopy(metric.clone()),
}


@pytest.mark.parametrize("from_run", [True, False], ids=["strategy", "ledger"])
@pytest.mark.parametrize("name", COPIES)
def test_copies_follow_the_live_ledger(name: str, from_run: bool) -> None:
    run, event = Run(), PrivacyEvent(kind="gaussian", noise_multiplier=1.0)
    run.ledger.record(event)
    metric = Epsilon(run if from_run else run.ledger, delta=1e-5, accountant="gdp")
    copied = COPIES[name](metric)
    assert copied is not metric
    run.ledger.record(event, 99)
    assert float(copied.compute()) == float(metric.compute()) > 50
    if from_run:
        run.ledger = Ledger()
        run.ledger.record(event, 2)
        assert float(copied.compute()) == float(metric.compute()) < 10


def test_copy_of_a_module_in_fit_follows_the_run(tmp_path: Any) -> None:
    """A module of exponential averages, say, is a copy that is made at the start."""
    strategy = DPStrategy(noise_multiplier=1.3, target_delta=1e-5, accountant="rdp", check_per_sample=False)
    copies: list[Any] = []

    class Averaged(Classifier):
        def on_fit_start(self) -> None:
            self.holder = Holder(Epsilon(self.trainer.strategy, delta=1e-5))
            copies.append(copy.deepcopy(self.holder))

    make_trainer(strategy, tmp_path, max_epochs=2).fit(Averaged(), make_loader(batch_size=32))
    assert float(copies[0].metric.compute()) == pytest.approx(strategy.epsilon())
    assert copies[0].layer is not None


def test_copy_has_state_of_its_own() -> None:
    metric = Epsilon(Ledger(), delta=1e-5, accountant="gdp")
    copied = metric.clone()
    copied.delta = 1e-3
    assert metric.delta == 1e-5


def test_pickled_metric_refuses_to_be_stale() -> None:
    ledger = Ledger()
    ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
    metric = Epsilon(ledger, delta=1e-5, accountant="gdp")
    content = pickle.dumps(Holder(metric))
    assert b"Ledger" not in content
    loaded = pickle.loads(content)
    for copied in (loaded.metric, loaded.metric.clone()):
        with pytest.raises(PrivacyError, match=r"Epsilon was unpickled .* Make another one: Epsilon\(trainer.strategy"):
            copied.compute()
    assert float(metric.compute()) > 4


def test_strategy_in_a_pickle_is_left_out(tmp_path: Any) -> None:
    """Else a module that is saved as a whole would hold Trainer, data and noise generator."""
    strategy = DPStrategy(noise_multiplier=1.3, target_delta=1e-5, accountant="rdp", check_per_sample=False)
    make_trainer(strategy, tmp_path, max_epochs=1).fit(Classifier(), make_loader(batch_size=32))
    assert len(pickle.dumps(Epsilon(strategy, delta=1e-5))) < 5000


def test_metric_sent_to_a_spawned_process_follows_its_run() -> None:
    """Run and metric are pickled together, as multiprocessing does at the start of a process."""
    run = Run()
    popen: Any = object()
    set_spawning_popen(popen)
    try:
        sent = ForkingPickler.dumps((run, Epsilon(run, 1e-5, "gdp")))
    finally:
        set_spawning_popen(None)
    received, metric = pickle.loads(sent)
    assert received is not run
    with pytest.raises(SystemExit, match="17"):
        follow(received, metric)
    assert run.ledger.num_steps == 0


@pytest.mark.slow
def test_spawned_process_keeps_the_strategy_of_its_own() -> None:
    """What is sent to a process at its start belongs together: the metric follows the strategy that was sent with
    it.
    """
    run = Run()
    process = multiprocessing.get_context("spawn").Process(target=follow, args=(run, Epsilon(run, 1e-5, "gdp")))
    process.start()
    process.join(120)
    assert process.exitcode == 17
