"""The figures of the privacy card: its curve, its picture, and numbers that are never below the truth."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest.mock import MagicMock

import pytest

from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from lightning_dp.reporting.card import NUM_POINTS, epsilon_curve, privacy_card
from lightning_dp.reporting.card_markdown import to_markdown
from lightning_dp.reporting.card_plot import plot_card
from lightning_dp.reporting.notes import RunNotes
from lightning_dp.reporting.statement import describe_epsilon, describe_share, stated_plan


@pytest.mark.parametrize("kind", ["poisson", "shuffle", "allocation"])
def test_curve_is_the_epsilon_of_each_prefix(kind: str) -> None:
    ledger, accountant = Ledger(), make_accountant("pld")
    made = getattr(PrivacyEvent, kind)
    rate = {"poisson": {"sample_rate": 0.1}, "allocation": {"num_batches": 40}}.get(kind, {})
    for sigma in (2.0, 1.5):
        ledger.start_pass()
        ledger.record(made(noise_multiplier=sigma, **rate), 40)
    points = dict(epsilon_curve(ledger, accountant, 1e-5))
    assert len(points) == NUM_POINTS
    assert list(points) == sorted(points)
    assert min(points) == 1
    assert points[80] == pytest.approx(accountant.epsilon(ledger, 1e-5), rel=1e-9)
    first = Ledger()
    first.record(made(noise_multiplier=2.0, **rate), 40)
    assert points[40] == pytest.approx(accountant.epsilon(first, 1e-5), rel=1e-9)
    assert points[80] > points[40] > 0


def test_card_names_random_allocation_and_joins_equal_noise() -> None:
    plan = stated_plan(
        {**_state(), "sampling": "shuffle", "sample_rate": None, "batches_per_pass": 10, "accountant": "pld"}
    )
    ledger = Ledger().extended([(PrivacyEvent.allocation(noise_multiplier=2.0, num_batches=10), 30, 3)])
    card = privacy_card(plan, ledger, make_accountant("pld"))
    assert "random allocation" in card["mechanism"]["sampling"]
    assert card["mechanism"]["batches_per_pass"] == 10
    assert card["mechanism"]["noise_over_steps"] == [{"steps": 30, "noise_multiplier": 2.0, "note": ""}]
    assert "exactly one of the 10 batches of a pass" in card["accounting"]["assumptions"]
    unamplified = privacy_card(dataclasses.replace(plan, accountant="gdp"), ledger, make_accountant("gdp"))
    assert "no amplification is claimed" in unamplified["accounting"]["assumptions"]
    # from the loss distribution, whoever computes epsilon
    assert unamplified["attacks"]["largest_advantage"] == pytest.approx(card["attacks"]["largest_advantage"], rel=1e-9)


@pytest.mark.parametrize("share", [1e-5, 0.00999999, 0.01, 0.0101, 0.5, 0.99999, 1.0])
def test_described_share_is_never_below(share: float) -> None:
    assert share <= float(describe_share(share).removesuffix(" %")) / 100 * (1 + 1e-12) <= share * 1.011


class _Axis:
    """Keeps what is drawn on it; whatever else is asked of it does nothing."""

    def __init__(self) -> None:
        self.drawn: list[tuple[Any, Any]] = []

    def plot(self, x: Any, y: Any, **_: Any) -> None:
        self.drawn.append((list(x), list(y)))

    loglog = plot

    def __getattr__(self, name: str) -> Any:
        return MagicMock()


def test_picture_begins_at_the_first_step_that_was_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    left, right = _Axis(), _Axis()
    monkeypatch.setattr(figure, "subplots", lambda *_: (left, right))
    plot_card([(1, 2.0), (10, "inf"), (20, 3.0)], [(1e-3, 2e-3), (1.0, 1.0)], delta=1e-5, target=4.0)
    assert left.drawn == [([1, 20], [2.0, 3.0])]
    assert right.drawn == [([1e-3, 1.0], [2e-3, 1.0]), ([1e-3, 1.0], [1e-3, 1.0])]


def test_picture_has_both_panels_and_none_without_epsilon() -> None:
    picture = plot_card([(1, 2.0), (20, 3.0)], [(1e-3, 2e-3), (1.0, 1.0)], delta=1e-5)
    assert picture is not None
    assert b"false positive rate" in picture
    assert b"epsilon at delta" in picture
    assert plot_card([(1, "inf")], [(1e-3, 1.0), (1.0, 1.0)], delta=1e-5) is None


def test_many_runs_of_noise_are_cut_in_the_markdown_only() -> None:
    ledger = Ledger()
    for number in range(14):
        ledger.record(PrivacyEvent.poisson(noise_multiplier=2.0 + number, sample_rate=0.1))
    card = privacy_card(stated_plan(_state()), ledger, make_accountant("rdp"), notes=RunNotes())
    assert len(card["mechanism"]["noise_over_steps"]) == 14
    assert "| from 13 on | 2 more runs of equal noise, in the JSON |" in to_markdown(card)
    assert card["accounting"]["computed_by"].startswith("dp-accounting ")


def test_card_needs_a_step() -> None:
    with pytest.raises(ValueError, match="no steps recorded"):
        privacy_card(stated_plan(_state()), Ledger(), make_accountant("rdp"))


@pytest.mark.parametrize(("name", "value"), [("delta", "small"), ("dataset_size", ...), ("clipping", None)])
def test_stated_plan_refuses_a_damaged_state(name: str, value: Any) -> None:
    state = _state()
    if value is ...:
        del state[name]
    else:
        state[name] = value
    with pytest.raises(ValueError, match=f"Expected an intact plan, got {name}="):
        stated_plan(state)


def _state() -> dict[str, Any]:
    return {
        "sampling": "poisson",
        "dataset_size": 100,
        "expected_batch_size": 10,
        "sample_rate": 0.1,
        "steps": 30,
        "noise_multiplier": 2.0,
        "clipping": "FlatClipping(max_grad_norm=1.0)",
        "delta": 1e-5,
        "target_epsilon": None,
        "accountant": "rdp",
        "neighboring_relation": "add_or_remove_one",
        "schedule": "",
    }


def test_described_epsilon_is_never_below() -> None:
    for epsilon in (1.23001, 0.000123451, 99_999.5, 123_451.0, 7.000001e9):
        assert epsilon <= float(describe_epsilon(epsilon)) <= 1.0002 * epsilon
    assert describe_epsilon(math.inf) == "infinite"
