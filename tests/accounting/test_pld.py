"""The composed privacy loss: above the truth, close to it, and the same whatever was asked before."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import Ledger, Mechanism, PrivacyEvent, gaussian_epsilon, make_accountant
from lightning_dp.accounting.loss_distribution import directions, discretize
from tests.accounting.reference import Pair, one_step_epsilon, two_step_epsilon

DELTA = 1e-5
RELATIONS = ["add_or_remove_one", "replace_one"]


def poisson(noise_multiplier, sample_rate):
    return PrivacyEvent.poisson(noise_multiplier=noise_multiplier, sample_rate=sample_rate)


def pld_of(*runs, relation="add_or_remove_one", delta=DELTA):
    return make_accountant("pld").epsilon(Ledger(relation).extended(runs), delta)


ONE_STEP = [(0.01, 1.0), (0.01, 0.4), (0.1, 0.7), (0.1, 4.3), (0.5, 1.0), (0.5, 20.0), (0.9, 0.3), (0.001, 0.35)]


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("event", ONE_STEP, ids=repr)
@pytest.mark.one_in(3)
def test_one_step_meets_numerical_integration(event, relation):
    """The reference's own error is below 1e-6 relative: 200,001 points of an analytic integrand with one kink."""
    sample_rate, noise_multiplier = event
    truth = one_step_epsilon(sample_rate, noise_multiplier, DELTA, relation)
    epsilon = pld_of((poisson(noise_multiplier, sample_rate), 1), relation=relation)
    assert truth * (1 - 1e-6) <= epsilon <= truth * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("events", [((0.1, 1.0), (0.1, 1.0)), ((0.01, 0.5), (0.2, 2.0))], ids=repr)
@pytest.mark.one_in(2)
def test_two_steps_meet_numerical_integration(events, relation):
    first, second = events
    truth = two_step_epsilon(first, second, DELTA, relation)
    epsilon = pld_of((poisson(*first[::-1]), 1), (poisson(*second[::-1]), 1), relation=relation)
    assert truth * (1 - 1e-4) <= epsilon <= truth * (1 + 1e-3)


@pytest.mark.parametrize("interval", [1e-3, 0.05, 0.7])
@pytest.mark.parametrize("event", ONE_STEP, ids=repr)
@pytest.mark.one_in(3)
def test_grid_dominates_the_release_at_every_epsilon(event, interval):
    """Also for grids far too coarse to be tight."""
    for direction in ("remove", "add", "replace"):
        grid = discretize(Mechanism(*event), direction, interval)
        losses = (grid.layout.offset + np.arange(grid.masses.size)) * interval
        pair = Pair(*event, direction)  # type: ignore[call-arg]
        assert grid.masses.sum() == pytest.approx(1, abs=1e-12)
        assert (grid.masses * np.exp(-losses)).sum() <= 1 + 1e-9
        for epsilon in (-1.0, -0.1, 0.0, 0.033, 0.3, 1.7, 4.0):
            above = losses > epsilon
            divergence = -np.expm1(epsilon - losses[above]) @ grid.masses[above]
            assert divergence >= pair.delta(epsilon) - 5e-9  # the reference's kink


def test_pair_of_replace_one_is_the_worst_of_all_pairs():
    """Two samples with contributions of any length along a line: opposite and full length is the worst."""
    x = np.linspace(-12, 12, 20_001)
    sample_rate, sigma = 0.3, 0.8

    def mixture(center):
        return (1 - sample_rate) * np.exp(-(x**2) / 2 / sigma**2) + sample_rate * np.exp(
            -((x - center) ** 2) / 2 / sigma**2
        )

    def divergence(one, other, epsilon):
        scale = (x[1] - x[0]) / sigma / math.sqrt(2 * math.pi)
        return np.maximum(mixture(one) - math.exp(epsilon) * mixture(other), 0).sum() * scale

    for epsilon in (0.05, 0.5, 1.5):
        worst = divergence(0.5, -0.5, epsilon)
        for one in np.linspace(-0.5, 0.5, 11):
            for other in np.linspace(-0.5, 0.5, 11):
                assert divergence(one, other, epsilon) <= worst + 1e-12
    assert directions("replace_one") == ("replace",)
    assert directions("add_or_remove_one") == ("remove", "add")


@pytest.mark.parametrize("num_steps", [1, 1000, 100_000])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-8, 1e-10, 1e-13])
def test_composition_meets_the_closed_form_as_the_rate_nears_one(num_steps, delta):
    """With rate 1 - 1e-12 the grid is used, and the exact epsilon is a Gaussian's."""
    sigma = 0.8 * math.sqrt(num_steps)
    truth = gaussian_epsilon(1 / 0.8, delta)
    epsilon = pld_of((poisson(sigma, 1 - 1e-12), num_steps), delta=delta)
    slack = 1e-3 if delta >= 1e-8 else 0.2  # rounding counts as infinite loss
    assert truth * (1 - 1e-6) <= epsilon <= truth * (1 + slack)


@pytest.mark.parametrize(
    ("sample_rate", "noise_multiplier", "num_steps"),
    [(1e-4, 1.19, 10_000), (0.001, 3.0, 5000), (0.01, 10.0, 1000), (0.001, 8.0, 100_000), (0.1, 30.0, 50)],
)
@pytest.mark.one_in(3)
def test_small_epsilon_is_tight(sample_rate, noise_multiplier, num_steps):
    """Against the same bound on a grid eight times finer, whose error is 64 times smaller."""
    run = (poisson(noise_multiplier, sample_rate), num_steps)
    fine = type(make_accountant("pld"))(step_parts=256, max_support=1 << 20)  # type: ignore[call-arg]
    truth = fine.epsilon(Ledger().extended([run]), DELTA)
    assert 0.001 < truth < 0.4
    assert truth * (1 - 1e-6) <= pld_of(run) <= 1.0025 * truth


@pytest.mark.parametrize("name", ["pld", "rdp"])
@pytest.mark.one_in(2)
def test_increments_agree_with_a_new_start(name):
    accountant, ledger = make_accountant(name), Ledger()
    for index in range(60):
        ledger.record(poisson(2 * 0.97 ** (index // 5), 0.02), 1 + index % 4)
        if index % 7 == 0:
            ledger.record(PrivacyEvent("gaussian", 20.0))
        epsilon = accountant.epsilon(ledger, DELTA)
        if index % 6 == 5:
            assert epsilon == pytest.approx(make_accountant(name).epsilon(ledger, DELTA), rel=1e-6)


@pytest.mark.slow
def test_long_run_of_increments_does_not_drift():
    accountant, ledger = make_accountant("pld"), Ledger()
    event = poisson(5.0, 0.3)
    for _ in range(600):
        ledger.record(event)
        epsilon = accountant.epsilon(ledger, DELTA)
    assert epsilon == pytest.approx(make_accountant("pld").epsilon(ledger, DELTA), rel=1e-8)


@pytest.mark.parametrize("name", ["pld", "rdp", "prv", "gdp"])
@pytest.mark.one_in(4)
def test_cache_notices_another_ledger(name):
    def history(*runs, relation="add_or_remove_one"):
        return Ledger(relation).extended(runs)

    a, b = (PrivacyEvent("gaussian", s) if name == "gdp" else poisson(s, 0.1) for s in (20.0, 21.0))
    amended = history((a, 50))
    amended.amend_last(b)
    longer = history((a, 50), (b, 1))  # on the grid of what comes next, so only the counts differ
    ledgers = [longer, history((a, 50)), history((a, 20)), history((b, 20)), history((a, 20), (b, 30)), amended]
    if name in ("pld", "gdp"):
        ledgers.append(history((a, 49), (b, 1), relation="replace_one"))
    accountant = make_accountant(name)
    for ledger in ledgers:
        for delta in (DELTA, 1e-3):
            expected = make_accountant(name).epsilon(ledger, delta)
            assert accountant.epsilon(ledger, delta) == pytest.approx(expected, rel=1e-9)


SIGMAS = st.floats(0.4, 20)
RATES = st.floats(0.001, 0.9)


@given(SIGMAS, RATES, st.integers(1, 300), st.floats(1.02, 2), st.sampled_from(RELATIONS))
@settings(deadline=None, max_examples=15)
def test_epsilon_is_monotone(sigma, rate, num_steps, factor, relation):
    """Less noise, more samples, more steps or a smaller delta never cost less (grids may differ by 1e-3)."""
    epsilon = pld_of((poisson(sigma, rate), num_steps), relation=relation)
    worse = [
        pld_of((poisson(sigma / factor, rate), num_steps), relation=relation),
        pld_of((poisson(sigma, min(1.0, rate * factor)), num_steps), relation=relation),
        pld_of((poisson(sigma, rate), math.ceil(num_steps * factor)), relation=relation),
        pld_of((poisson(sigma, rate), num_steps), relation=relation, delta=DELTA / 10),
    ]
    assert min(worse) >= epsilon * (1 - 1e-3)


@pytest.mark.parametrize(
    ("sample_rate", "noise_multiplier"), [(0.5, 1e-3), (0.1, 0.02), (0.1, 1e4), (1e-9, 1.0), (1 - 1e-9, 0.05)]
)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.one_in(2)
def test_extreme_releases_stay_bounds(sample_rate, noise_multiplier, relation):
    """Between the epsilon of no release and that of an unsampled one, whose grid error is 1e-3 here."""
    for num_steps in (1, 1000):
        epsilon = pld_of((poisson(noise_multiplier, sample_rate), num_steps), relation=relation)
        unsampled = gaussian_epsilon(math.sqrt(num_steps) / noise_multiplier, DELTA)
        assert 0 <= epsilon <= unsampled * (1 + 1e-3) + 1e-6


def test_delta_below_rounding_is_bounded_by_renyi():
    ledger = Ledger().extended([(poisson(1.0, 0.01), 100_000)])
    assert make_accountant("pld").epsilon(ledger, 1e-30) == make_accountant("rdp").epsilon(ledger, 1e-30) < math.inf


@pytest.mark.parametrize("delta", [0.2, 0.45, 0.6829, 0.9])
def test_a_delta_above_the_total_variation_costs_nothing(delta: float) -> None:
    """At sigma 1/2 a release with and without a record differs by TV = 2 Phi(1) - 1 = 0.6827 in total variation."""
    ledger = Ledger()
    ledger.record(PrivacyEvent.poisson(noise_multiplier=0.5, sample_rate=1 - 1e-9))
    assert (make_accountant("pld").epsilon(ledger, delta) == 0.0) == (delta > 0.6828)
