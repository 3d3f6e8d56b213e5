"""What a run costs: sensitivity, exact accounting, the published settings, calibration."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_dp.accounting import Ledger, PrivacyEvent, gaussian_epsilon, make_accountant
from lightning_dp.datalens import DataLensPlan, DataLensSettings, epsilon_after
from lightning_dp.datalens.plan import sensitivity
from tests.cases import each


def make_plan(**options: Any) -> DataLensPlan:
    defaults: dict[str, Any] = {
        "dataset_size": 60_000,
        "num_teachers": 4000,
        "top_k": 200,
        "batch_size": 15,
        "noise_std": 5000.0,
        "threshold": 0.7,
        "steps": 86,
        "delta": 1e-5,
    }
    return DataLensPlan(**{**defaults, **options})


def published_steps(target: float, *, sigma: float, top_k: int = 200, batch_size: int = 15) -> int:
    """Steps the authors' code takes: the last before max_eps, by Rényi orders 2 to 201 and the 2017 conversion."""
    cost = 2 * top_k * batch_size / sigma**2
    steps = 0
    while min(a * cost * (steps + 1) + math.log(1e5) / (a - 1) for a in range(2, 202)) <= target:
        steps += 1
    return steps


@pytest.mark.parametrize(("claimed", "sigma", "exact"), [(1.0, 5000.0, 0.738), (10.0, 900.0, 8.50)])
def test_shipped_mnist_settings_cost_less_than_claimed(claimed: float, sigma: float, exact: float) -> None:
    """Exact GDP at the authors' own step counts."""
    steps = published_steps(claimed, sigma=sigma)
    plan = make_plan(noise_std=sigma, steps=steps)
    ledger = Ledger("replace_one").extended(plan.runs(0, steps))
    epsilon = make_accountant("gdp").epsilon(ledger, 1e-5)
    assert epsilon == pytest.approx(exact, abs=6e-4 if exact < 1 else 4e-3)
    assert epsilon == pytest.approx(epsilon_after(steps, sigma=sigma, top_k=200, batch_size=15, delta=1e-5), rel=1e-9)


def test_a_step_adds_4_k_b_over_sigma_squared_to_mu_squared() -> None:
    plan = make_plan(top_k=7, batch_size=5, noise_std=90.0)
    ledger = Ledger("replace_one").extended(plan.runs(3, 13))
    assert ledger.num_steps == 10
    mu = math.sqrt(10 * 4 * 7 * 5 / 90.0**2)
    assert make_accountant("gdp").epsilon(ledger, 1e-5) == pytest.approx(gaussian_epsilon(mu, 1e-5), rel=1e-9)


@pytest.mark.parametrize("accountant", ["gdp", "pld", "rdp"])
def test_one_release_of_b_samples_is_b_releases_of_one(accountant: str) -> None:
    plan = make_plan(top_k=7, batch_size=5, noise_std=90.0)
    apart = Ledger("replace_one")
    apart.record(PrivacyEvent.gaussian(noise_multiplier=90.0 / (2 * math.sqrt(7))), 5 * 10)
    together = Ledger("replace_one").extended(plan.runs(0, 10))
    epsilons = [make_accountant(accountant).epsilon(ledger, 1e-5) for ledger in (apart, together)]
    assert epsilons[0] == pytest.approx(epsilons[1], rel=1e-9)


def test_sensitivity_of_a_step() -> None:
    assert sensitivity(top_k=9, batch_size=1) == pytest.approx(6.0)
    assert sensitivity(top_k=9, batch_size=4) == pytest.approx(12.0)
    assert make_plan().noise_multiplier == pytest.approx(5000 / (2 * math.sqrt(3000)))


def test_no_noise_is_infinite_epsilon() -> None:
    ledger = Ledger("replace_one").extended(make_plan(noise_std=0.0).runs(0, 1))
    assert math.isinf(make_accountant("gdp").epsilon(ledger, 1e-5))


@pytest.mark.parametrize("accountant", ["gdp", "pld", "rdp"])
@pytest.mark.parametrize("target", [0.3, 1.0, 10.0])
def test_calibration_meets_the_target_from_below(accountant: str, target: float) -> None:
    chosen = make_accountant(accountant)
    plan = make_plan(target_epsilon=target, noise_std=0.0, steps=300).calibrated(
        start=0, ledger=Ledger("replace_one"), accountant=chosen
    )
    epsilon = chosen.epsilon(Ledger("replace_one").extended(plan.runs(0, 300)), 1e-5)
    assert 0.99 * target <= epsilon <= target


def test_calibration_counts_what_is_spent_already() -> None:
    accountant = make_accountant("gdp")
    spent = Ledger("replace_one").extended(make_plan(noise_std=9000.0).runs(0, 100))
    fresh, later = (
        make_plan(target_epsilon=1.0, steps=300).calibrated(start=100, ledger=ledger, accountant=accountant)
        for ledger in (Ledger("replace_one"), spent)
    )
    assert later.noise_std > fresh.noise_std
    assert 0.99 <= accountant.epsilon(spent.extended(later.runs(100, 300)), 1e-5) <= 1.0


def test_an_unbounded_run_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match="known number of steps"):
        make_plan(target_epsilon=1.0, steps=None).calibrated(
            start=0, ledger=Ledger("replace_one"), accountant=make_accountant("gdp")
        )


@each(
    "options, message",
    [
        ({}, "exactly one of sigma and target_epsilon"),
        ({"sigma": 1.0, "target_epsilon": 1.0}, "exactly one of sigma and target_epsilon"),
        ({"sigma": -1.0}, "0 <= sigma"),
        ({"sigma": math.nan}, "0 <= sigma"),
        ({"target_epsilon": 0.0}, "target_epsilon"),
        ({"sigma": 1.0, "target_delta": 1.0}, "target_delta"),
        ({"sigma": 1.0, "threshold": 1.0}, "threshold < 1"),
        ({"sigma": 1.0, "threshold": math.nan}, "threshold < 1"),
        ({"sigma": 1.0, "top_k": 0}, "top_k >= 1"),
        ({"sigma": 1.0, "num_teachers": 0}, "num_teachers >= 1"),
        ({"sigma": 1.0, "batch_size": 0}, "batch_size >= 1"),
        ({"sigma": 1.0, "teacher_chunk_size": 0}, "teacher_chunk_size >= 1"),
        ({"sigma": 1.0, "alpha": math.inf}, "alpha < inf"),
        ({"sigma": 1.0, "betas": (0.5, 1.0)}, "betas"),
        ({"sigma": 1.0, "signs": "none"}, "signs"),
        ({"sigma": 1.0, "pretrain_steps": -1}, "pretrain_steps"),
        ({"sigma": 1.0, "public_seed": None}, "public_seed"),
        ({"sigma": 1.0, "seed": 1, "secure_rng": True}, "without a seed"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataLensSettings(**{"num_teachers": 5, "top_k": 1, **options})
