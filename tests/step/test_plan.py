"""The frozen plan: default delta, noise under each relation, events and runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_dp import schedules
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from lightning_dp.clipping import FlatClipping, NoClipping, PerLayerClipping
from lightning_dp.clipping.bounds import Bound
from lightning_dp.reporting.notes import RunNotes
from lightning_dp.reporting.statement import describe_epsilon, privacy_statement, stated_plan, summary_line
from lightning_dp.step.plan import DPPlan, default_delta
from lightning_dp.step.release import plan_release


def make_plan(**options: Any) -> DPPlan:
    fields: dict[str, Any] = {
        "sampling": "poisson",
        "dataset_size": 1000,
        "expected_batch_size": 100,
        "sample_rate": 0.1,
        "steps": 20,
        "steps_per_epoch": 10,
        "noise_multiplier": 2.0,
        "clipping": FlatClipping(0.5),
        "delta": 1e-5,
    }
    return DPPlan(**{**fields, **options})


@pytest.mark.parametrize(
    ("size", "delta"), [(1, 0.1), (10, 0.01), (1437, 1e-5), (50_000, 1e-6), (60_000, 1e-6), (10**9, 1e-10)]
)
def test_default_delta_is_a_power_of_ten_below_one_over_ten_n(size: int, delta: float) -> None:
    assert default_delta(size) == delta
    assert delta <= 1 / (10 * size) * (1 + 1e-9) < 10 * delta * (1 + 1e-9)


@pytest.mark.parametrize(("relation", "factor"), [("add_or_remove_one", 1), ("zero_out", 1), ("replace_one", 2)])
@pytest.mark.parametrize(("clipping", "groups"), [(FlatClipping(0.5), 1), (PerLayerClipping(0.5), 4)])
def test_noise_doubles_where_a_record_is_replaced(relation: str, factor: int, clipping: Any, groups: int) -> None:
    plan = make_plan(neighboring_relation=relation, clipping=clipping)
    release = plan_release(plan, 0, clipping=clipping, sizes=[7] * groups, bound=Bound(), num_releases=1)
    assert release.drawn_std == pytest.approx(2.0 * 0.5 * factor)


def test_runs_follow_the_schedule_and_the_steps() -> None:
    plan = make_plan(schedule=schedules.step(factor=0.5, every=8))
    assert [(event.noise_multiplier, count) for event, count in plan.runs(0, 20)] == [(2.0, 8), (1.0, 8), (0.5, 4)]
    assert [(event.noise_multiplier, count) for event, count in plan.runs(6, 10, 1.0)] == [(1.0, 2), (0.5, 2)]
    assert all(event.kind == "poisson" and event.sample_rate == 0.1 for event, _ in plan.runs(0, 20))


def test_runs_of_shuffled_batches_say_their_passes() -> None:
    plan = make_plan(sampling="shuffle", sample_rate=None)
    assert [(event.kind, *counts) for event, *counts in plan.runs(0, 20)] == [("shuffle", 10, 1)] * 2
    uneven = make_plan(sampling="shuffle", sample_rate=None, schedule=schedules.step(factor=0.5, every=15))
    assert [(event.noise_multiplier, *counts) for event, *counts in uneven.runs(0, 20)] == [
        (2.0, 10, 1),
        (2.0, 5, 1),
        (1.0, 5, 0),
    ]
    # a resume begins a pass wherever it starts; the rest of a pass that is cut is a whole one
    assert [counts for _, *counts in plan.runs(13, 24)] == [[7, 1], [4, 1]]


def test_pass_costs_its_smallest_sigma_in_plan_and_ledger() -> None:
    plan = make_plan(sampling="shuffle", batches_per_pass=10, schedule=schedules.step(factor=0.5, every=15))
    planned, taken = Ledger().extended(plan.runs(0, 20)), Ledger()
    for step in range(20):
        if step % 10 == 0:
            taken.start_pass()
        taken.record(plan.event(step))
    assert planned.mechanisms() == taken.mechanisms() == {(0.1, 2.0, 10): 1, (0.1, 1.0, 10): 1}


def test_random_allocation_needs_fair_draws_and_the_relation() -> None:
    shuffled = {"sampling": "shuffle", "sample_rate": None, "steps_per_epoch": 4}
    allocated = make_plan(**shuffled, batches_per_pass=10)
    # a pass cut to 4 of its 10 batches is still one of 10
    assert [(event.kind, event.num_batches, *counts) for event, *counts in allocated.runs(0, 8)] == [
        ("allocation", 10, 4, 1)
    ] * 2
    for options in (
        {"batches_per_pass": None},
        {"batches_per_pass": 10, "neighboring_relation": "replace_one"},
        {"batches_per_pass": 10, "neighboring_relation": "zero_out"},
    ):
        plan = make_plan(**shuffled, **options)
        assert {event.kind for event, *_ in plan.runs(0, 8)} == {"shuffle"}
        assert "shuffled batches without amplification" in summary_line(
            plan, Ledger(plan.neighboring_relation).extended(plan.runs(0, 8)), make_accountant("pld")
        )


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv", "gdp", "tcdp"])
def test_statement_claims_only_amplification_accounted_for(accountant: str) -> None:
    plan = make_plan(sampling="shuffle", sample_rate=None, batches_per_pass=10, accountant=accountant)
    ledger = Ledger().extended(plan.runs(0, 20))
    whole = Ledger().extended([(PrivacyEvent.gaussian(noise_multiplier=2.0), 2)])
    line = summary_line(plan, ledger, make_accountant(accountant))
    amplified = accountant in ("pld", "rdp")
    assert ("random allocation to 10 batches per pass" in line) == amplified
    assert ("shuffled batches without amplification" in line) == (not amplified)
    ratio = make_accountant(accountant).epsilon(ledger, 1e-5) / make_accountant(accountant).epsilon(whole, 1e-5)
    assert ratio < 0.75 if amplified else ratio == 1


def test_saved_plans_keep_how_passes_are_accounted() -> None:
    plan = make_plan(sampling="shuffle", sample_rate=None, batches_per_pass=10)
    assert stated_plan(plan.state_dict()).allocates
    older = plan.state_dict()
    del older["batches_per_pass"]
    assert not stated_plan(older).allocates


def test_saved_plans_differ_where_schedules_differ_in_any_step() -> None:
    def saved(factor: float) -> object:
        # a new value in every step, and the last one in question
        return make_plan(steps=3000, schedule=lambda t: factor if t == 2999 else 1 + t / 3000).state_dict()["schedule"]

    assert saved(0.5) == saved(0.5)
    assert saved(0.5) != saved(0.25)
    assert make_plan(steps=None).state_dict()["schedule"] == ""


def test_without_clipping_nothing_is_private() -> None:
    plan = make_plan(clipping=NoClipping())
    ledger = Ledger().extended(plan.runs(0, 20))
    assert make_accountant("rdp").epsilon(ledger, 1e-5) == math.inf
    assert "epsilon=infinite" in summary_line(plan, ledger, make_accountant("rdp"))


@pytest.mark.parametrize("epsilon", [1e-4, 0.0123456, 0.99999999, 1.0, 1.23001, 12.3456789, 12345.678])
def test_epsilon_is_never_rounded_down(epsilon: float) -> None:
    shown = float(describe_epsilon(epsilon))
    assert epsilon * (1 - 1e-12) <= shown <= epsilon * 1.0002


def test_no_steps_are_no_epsilon() -> None:
    line = summary_line(make_plan(), Ledger(), make_accountant("rdp"))
    assert line == "Privacy: no steps recorded."


def test_statement_names_what_is_not_covered() -> None:
    plan = make_plan()
    ledger = Ledger().extended(plan.runs(0, 20))
    statement = privacy_statement(plan, ledger, make_accountant("rdp"), RunNotes(seeded=True))
    for part in (
        "adding or removing one record",
        "1000 records",
        "noise multiplier: 2 ",
        "validation",
        "a seed was set",
    ):
        assert part in statement
    assert "a seed was set" not in privacy_statement(plan, ledger, make_accountant("rdp"), RunNotes())
