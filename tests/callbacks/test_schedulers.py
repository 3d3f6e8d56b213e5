"""NoiseScheduler and ClippingScheduler under a Trainer: the noise of every step, the ledger, the reference epsilons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting as dp
import lightning as L
import pytest
import torch
from dp_accounting import pld
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import ClippingScheduler, DPStrategy, NoiseScheduler
from lightning_dp.accounting import Ledger, make_accountant
from lightning_dp.step.plan import DPPlan
from tests.cases import each
from tests.helpers import NUM_FEATURES, Classifier, make_loader, make_trainer
from tests.step.composition.table import NoiseSpy

#: arguments -> the factor in interval e of which ``last`` is the last; a new kind enters this table
KINDS: dict[str, tuple[dict[str, Any], Callable[[int, int], float]]] = {
    "constant": ({"kind": "constant"}, lambda e, last: 1.0),
    "step": ({"kind": "step", "factor": 0.5}, lambda e, last: 0.5**e),
    "step-rate": ({"kind": "step", "rate": 0.49}, lambda e, last: 0.7**e),
    "exponential": ({"kind": "exponential", "factor": 0.8}, lambda e, last: 0.8**e),
    "exponential-rate": ({"kind": "exponential", "rate": 0.3}, lambda e, last: math.exp(-0.15 * e)),
    "linear": ({"kind": "linear", "factor": 0.25}, lambda e, last: 1 - 0.75 * e / last),
    "linear-rate": ({"kind": "linear", "rate": 0.64}, lambda e, last: 0.8**e),
    "time": ({"kind": "time", "rate": 0.5}, lambda e, last: (1 + 0.5 * e) ** -0.5),
    "cosine": (
        {"kind": "cosine", "factor": 0.25},
        lambda e, last: 1 - 0.75 * (1 - math.cos(math.pi * e / last)) / 2,
    ),
    "function": ({"kind": lambda e: 1 / (1 + e)}, lambda e, last: 1 / (1 + e)),
}
#: arguments, steps an interval (four steps an epoch, four epochs)
INTERVALS: dict[str, tuple[dict[str, Any], int]] = {
    "epoch": ({}, 4),
    "two epochs": ({"every_n_epochs": 2}, 8),
    "three steps": ({"every_n_epochs": 3, "interval": "step"}, 3),
}
NUM_STEPS = 16
#: every kind with one interval, every interval with several kinds
PAIRS = [*zip(KINDS, itertools.cycle(INTERVALS), strict=False)]


def quick(**options: Any) -> DPStrategy:
    defaults = {"target_delta": 1e-3, "check_per_sample": False, "max_grad_norm": 0.5}
    return DPStrategy(**{**defaults, **options})


def expected_factors(kind: str, interval: str) -> list[float]:
    (_, factor), (_, every) = KINDS[kind], INTERVALS[interval]
    return [factor(step // every, (NUM_STEPS - 1) // every) for step in range(NUM_STEPS)]


def sigmas(ledger: Ledger) -> list[float]:
    return [run.event.noise_multiplier for run in ledger.entries for _ in range(run.num_steps)]


@pytest.mark.parametrize(
    ("kind", "interval"),
    [
        pytest.param(*pair, marks=() if pair in PAIRS else pytest.mark.slow)
        for pair in itertools.product(KINDS, INTERVALS)
    ],
)
@pytest.mark.one_in(3)
def test_noise_and_ledger_follow_the_schedule(
    kind: str, interval: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, strategy = NoiseSpy(monkeypatch), quick(noise_multiplier=2.0)
    scheduler = NoiseScheduler(**KINDS[kind][0], **INTERVALS[interval][0])
    make_trainer(strategy, tmp_path, max_epochs=4, callbacks=[scheduler]).fit(Classifier(), make_loader())
    factors = expected_factors(kind, interval)
    assert sigmas(strategy.ledger) == pytest.approx([2.0 * factor for factor in factors])
    assert [draw.std for draw in spy.draws] == pytest.approx([2.0 * factor * 0.5 for factor in factors])


@pytest.mark.parametrize(("kind", "interval"), PAIRS)
@pytest.mark.one_in(3)
def test_bound_follows_the_schedule_ledger_stays(
    kind: str, interval: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, strategy = NoiseSpy(monkeypatch), quick(noise_multiplier=2.0)
    scheduler = ClippingScheduler(**KINDS[kind][0], **INTERVALS[interval][0])
    make_trainer(strategy, tmp_path, max_epochs=4, callbacks=[scheduler]).fit(Classifier(), make_loader())
    assert sigmas(strategy.ledger) == [2.0] * NUM_STEPS
    assert [draw.std for draw in spy.draws] == pytest.approx([2.0 * f * 0.5 for f in expected_factors(kind, interval)])


@pytest.mark.parametrize("kind", ["step", "time", "cosine", "function"])
@pytest.mark.one_in(2)
def test_target_is_calibrated_over_the_whole_schedule(kind: str, tmp_path: Path) -> None:
    """Within 1 % and never above; with the noise of the first step throughout the target would not be reached."""
    strategy = quick(target_epsilon=2.0)
    trainer = make_trainer(strategy, tmp_path, max_epochs=4, callbacks=[NoiseScheduler(**KINDS[kind][0])])
    trainer.fit(Classifier(), make_loader())
    assert 1.98 <= strategy.epsilon() <= 2.0
    constant = Ledger()
    constant.record(strategy.plan.event(0), NUM_STEPS)
    assert make_accountant("pld").epsilon(constant, 1e-3) < 1.9


class Planned(L.Callback):
    """Ends a run where it would begin, and keeps its plan."""

    plan: DPPlan

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.plan = trainer.strategy.plan  # type: ignore[union-attr]
        raise RuntimeError("planned")


@pytest.mark.parametrize(
    ("factor", "reference", "equivalent"),
    [(0.9, 3.156, 3.100), (0.8, 5.330, 4.555), (0.5, 359.0, 154.0), (1.0, None, None)],
    ids=["0.9", "0.8", "0.5", "constant"],
)
def test_reference_epsilons(factor: float, reference: float | None, equivalent: float | None, tmp_path: Path) -> None:
    """Q = 0.01, 60 epochs of 100 steps, delta 1e-5, four plateaus from sigma 1.5: three digits, out of a planned run.

    The constant case is composed by dp_accounting. The "equivalent" constant sigma would understate all others.
    """
    planned, strategy = Planned(), DPStrategy(noise_multiplier=1.5, target_delta=1e-5)
    scheduler = NoiseScheduler("step", factor=factor, every_n_epochs=15)
    trainer = make_trainer(strategy, tmp_path, max_epochs=60, callbacks=[scheduler, planned])
    data = TensorDataset(torch.zeros(60_000, NUM_FEATURES), torch.zeros(60_000, dtype=torch.long))
    with pytest.raises(RuntimeError, match="planned"):
        trainer.fit(Classifier(), DataLoader(data, batch_size=600, shuffle=True))
    plan = planned.plan
    assert plan.steps == 6000
    ledger = Ledger().extended(plan.runs(0, plan.steps))
    epsilon = make_accountant("pld").epsilon(ledger, plan.delta)
    if reference is None or equivalent is None:
        accountant = pld.PLDAccountant()
        accountant.compose(dp.PoissonSampledDpEvent(0.01, dp.GaussianDpEvent(1.5)), 6000)
        assert epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=5e-4)
    else:
        assert epsilon == pytest.approx(reference, rel=5e-4 if reference < 100 else 1.5e-3)
        assert epsilon > equivalent * 1.01


@each("make", [NoiseScheduler, ClippingScheduler])
@each(
    "arguments, error, message",
    [
        ({"kind": "cubic", "factor": 0.5}, ValueError, "kind to be one of"),
        ({"kind": "step"}, ValueError, "exactly one of factor and rate"),
        ({"kind": "step", "factor": 0.5, "rate": 0.25}, ValueError, "exactly one of factor and rate"),
        ({"kind": "step", "factor": float("nan")}, ValueError, "factor < inf, got factor=nan"),
        ({"kind": "exponential", "rate": -1.0}, ValueError, "rate < inf, got rate=-1"),
        ({"kind": "constant", "factor": 0.5}, ValueError, "neither factor nor rate"),
        ({"kind": lambda e: 1.0, "rate": 0.5}, ValueError, "neither factor nor rate"),
        ({"kind": "time", "factor": 0.5}, ValueError, "rate alone with kind='time'"),
        ({"kind": "cosine", "rate": 0.5}, ValueError, "factor alone with kind='cosine'"),
        ({"kind": "step", "factor": 0.5, "every_n_epochs": 0}, ValueError, "every_n_epochs"),
        ({"kind": "step", "factor": 0.5, "every_n_epochs": 1.5}, TypeError, "every_n_epochs"),
        ({"kind": "step", "factor": 0.5, "interval": "batch"}, ValueError, "interval to be one of"),
    ],
)
def test_scheduler_arguments(make: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**arguments)


@pytest.mark.parametrize("make", [NoiseScheduler, ClippingScheduler])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_schedule_without_a_usable_value_ends_the_run(
    make: Any, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = NoiseSpy(monkeypatch)
    trainer = make_trainer(
        quick(noise_multiplier=1.0), tmp_path, max_epochs=2, callbacks=[make(lambda e: value if e else 1.0)]
    )
    with pytest.raises(ValueError, match=r"finite values > 0|0 < factor < inf"):
        trainer.fit(Classifier(), make_loader())
    assert len(spy.draws) == (0 if make is NoiseScheduler else 4)


@pytest.mark.parametrize("make", [NoiseScheduler, ClippingScheduler])
def test_a_ramp_needs_the_end_of_the_run(make: Any, tmp_path: Path) -> None:
    trainer = make_trainer(quick(noise_multiplier=1.0), tmp_path, max_epochs=-1, callbacks=[make("linear", factor=0.5)])
    with pytest.raises(ValueError, match=r"Expected a bounded run with kind='linear' and factor"):
        trainer.fit(Classifier(), make_loader())
