"""How many steps a budget of epsilon pays for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from lightning_dp.accounting import Accountant, Ledger, make_accountant
from lightning_dp.clipping import FlatClipping
from lightning_dp.step.limit import EpsilonLimit, Limit
from lightning_dp.step.plan import DPPlan

DELTA = 1e-5


def make_plan(steps: int | None) -> DPPlan:
    return DPPlan(
        sampling="poisson",
        dataset_size=1000,
        expected_batch_size=100,
        sample_rate=0.1,
        steps=steps,
        steps_per_epoch=10,
        noise_multiplier=2.0,
        clipping=FlatClipping(1.0),
        delta=DELTA,
        schedule=lambda step: 1.0 + (step >= 5),
    )


@dataclass
class Run:
    plan: DPPlan
    steps_taken: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    accountant: Accountant = field(default_factory=lambda: make_accountant("rdp"))

    def spent_after(self, step: int, delta: float = DELTA) -> float:
        return self.accountant.epsilon(self.ledger.extended(self.plan.runs(self.steps_taken, step)), delta)


def test_limit_is_none_by_default() -> None:
    assert math.isinf(Limit().last_step(Run(make_plan(10))))


@pytest.mark.parametrize("steps", [None, 40, 5000])
@pytest.mark.parametrize(("taken", "history"), [(0, 0), (7, 7), (0, 6)])
def test_last_step_is_the_last_within_the_budget(steps: int | None, taken: int, history: int) -> None:
    """Also where the ledger holds more than the steps of this run: a learning-rate search before it."""
    run = Run(make_plan(steps), steps_taken=taken)
    for step in range(history):
        run.ledger.record(run.plan.event(step))
    budget = (run.spent_after(20) + run.spent_after(21)) / 2
    last = EpsilonLimit(budget).last_step(run)
    assert last == 20
    assert run.spent_after(int(last)) <= budget < run.spent_after(int(last) + 1)


def test_last_step_at_another_delta() -> None:
    run = Run(make_plan(None))
    budget = (run.spent_after(20, 1e-7) + run.spent_after(21, 1e-7)) / 2
    assert EpsilonLimit(budget, delta=1e-7).last_step(run) == 20
    assert EpsilonLimit(budget).last_step(run) > 20


def test_last_step_of_a_run_that_has_spent_everything() -> None:
    run = Run(make_plan(None), steps_taken=3)
    assert EpsilonLimit(1e-6).last_step(run) == 3


def test_last_step_of_a_run_at_its_end() -> None:
    assert EpsilonLimit(100.0).last_step(Run(make_plan(4), steps_taken=4)) == 4


@pytest.mark.parametrize(
    ("epsilon", "delta", "message"),
    [(0.0, None, "0 < epsilon < inf"), (math.nan, None, "0 < epsilon < inf"), (1.0, 1.0, "0 < delta < 1")],
)
def test_limit_arguments(epsilon: float, delta: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpsilonLimit(epsilon, delta)
