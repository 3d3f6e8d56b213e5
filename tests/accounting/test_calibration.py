import itertools
import math

import pytest

from lightning_dp.accounting import (
    Ledger,
    PrivacyEvent,
    calibrate_noise_multiplier,
    make_accountant,
    max_steps_within,
    rdp,
)

DELTA = 1e-5


def constant(sample_rate, num_steps):
    return lambda sigma: [(PrivacyEvent.poisson(noise_multiplier=sigma, sample_rate=sample_rate), num_steps)]


def decaying(sample_rate, num_steps, num_sigmas, factor):
    def runs(sigma):
        return [
            (PrivacyEvent.poisson(noise_multiplier=sigma * factor**index, sample_rate=sample_rate), num_steps)
            for index in range(num_sigmas)
        ]

    return runs


def calibrate(runs, target, accountant="pld", history=None):
    return calibrate_noise_multiplier(
        target_epsilon=target,
        delta=DELTA,
        accountant=make_accountant(accountant),
        runs=runs,
        history=Ledger() if history is None else history,
    )


def check(runs, target, accountant="pld", history=None):
    """By a new accountant: within the target, at least 99 % of it, and 2 % less noise is too little."""
    history = Ledger() if history is None else history
    sigma = calibrate(runs, target, accountant, history)
    epsilon = make_accountant(accountant).epsilon(history.extended(runs(sigma)), DELTA)
    assert 0.99 * target <= epsilon <= target
    assert make_accountant(accountant).epsilon(history.extended(runs(sigma * 0.98)), DELTA) > target


@pytest.mark.parametrize(
    ("target", "sample_rate", "num_steps"), [(0.1, 0.001, 10), (1.0, 0.1, 10_000), (20.0, 1.0, 10)]
)
def test_calibration_is_close_below_the_target(target, sample_rate, num_steps):
    check(constant(sample_rate, num_steps), target)


TARGETS, RATES, STEPS = (0.1, 0.5, 2.0, 8.0, 20.0), (1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0), (1, 10, 1000, 100_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "sample_rate", "num_steps"),
    [
        (TARGETS[i], RATES[j], STEPS[k])
        for i, j, k in itertools.product(range(5), range(6), range(4))
        if (i + j + k) % 2 == 0  # any two values meet
    ],
)
def test_calibration_is_close_below_the_target_everywhere(target, sample_rate, num_steps):
    check(constant(sample_rate, num_steps), target)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.one_in(2)
def test_calibration_works_with_every_sampled_accountant(accountant):
    check(constant(0.02, 500), 2.0, accountant)


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0])
@pytest.mark.one_in(3)
def test_rdp_searches_at_whole_orders(target, monkeypatch):
    """Fractional orders take most of the time; a few evaluations at all orders decide."""
    asked, original = [], rdp._poisson_divergences

    def counted(key, orders):
        asked.append(len(orders))
        return original(key, orders)

    monkeypatch.setattr(rdp, "_poisson_divergences", counted)
    rdp.divergences_of.cache_clear()
    calibrate(constant(0.02, 500), target, "rdp")
    assert 1 <= asked.count(len(rdp.RDPAccountant.orders)) <= 4 < len(asked)


@pytest.mark.parametrize("sigma", [0.7, 1.5, 6.0])
def test_rdp_at_whole_orders_is_a_close_upper_bound(sigma):
    ledger, accountant = Ledger().extended(constant(0.02, 500)(sigma)), make_accountant("rdp")
    exact, coarse = accountant.epsilon(ledger, DELTA), accountant.coarse().epsilon(ledger, DELTA)
    assert exact <= coarse <= 1.05 * exact


def test_calibration_without_sampling_with_gdp():
    check(lambda sigma: [(PrivacyEvent.shuffle(noise_multiplier=sigma), 600, 6)], 2.0, "gdp")


def test_calibration_of_a_schedule():
    check(decaying(0.02, 50, 8, 0.85), 3.0)


@pytest.mark.slow
def test_calibration_of_a_schedule_of_a_hundred_multipliers():
    check(decaying(0.01, 100, 100, 0.99), 3.0)


def test_calibration_counts_the_history():
    runs = constant(0.02, 500)
    history = Ledger().extended(runs(1.5))
    check(runs, 2.0, history=history)
    assert calibrate(runs, 2.0, history=history) > 1.2 * calibrate(runs, 2.0)


def test_calibration_under_replace_one():
    check(constant(0.02, 500), 2.0, history=Ledger("replace_one"))


def test_history_beyond_the_target_is_refused_with_what_is_spent():
    history = Ledger().extended(constant(0.1, 100)(1.0))
    spent = make_accountant("pld").epsilon(history, DELTA)
    with pytest.raises(ValueError, match=rf"already spent.*epsilon={spent:.6g} spent in 100 steps"):
        calibrate(constant(0.1, 100), spent * 0.99, history=history)


def test_target_out_of_reach_is_refused_with_what_is_spent():
    with pytest.raises(ValueError, match=r"reachable target.*of which 0 is already spent"):
        calibrate(lambda sigma: [*constant(0.1, 10)(sigma), *constant(0.1, 100)(1.0)], 2.0)
    with pytest.raises(ValueError, match=r"reachable target.*epsilon=inf"):
        calibrate(lambda sigma: [(PrivacyEvent.non_private("no clipping"), 1)], 2.0)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_target_out_of_range_is_refused(target):
    with pytest.raises(ValueError, match=f"target_epsilon < inf, got target_epsilon={target}"):
        calibrate(constant(0.1, 10), target)


def test_plan_that_costs_nothing_gets_the_smallest_multiplier():
    assert calibrate(constant(0.0, 10), 1.0) == 1e-3


@pytest.mark.parametrize("num_history", [0, 400])
def test_max_steps_is_the_last_count_within_the_budget(num_history):
    runs = [*constant(0.05, 700)(1.2), *constant(0.05, 700)(1.0)]
    history = Ledger().extended(constant(0.05, 1)(1.2) * num_history)
    accountant = make_accountant("pld")
    allowed = max_steps_within(epsilon=6.0, delta=DELTA, accountant=accountant, history=history, runs=runs)
    assert 0 < allowed < 1400

    def spent(num_steps):
        first = min(num_steps, 700)
        plan = [(runs[0][0], first)] + ([(runs[1][0], num_steps - first)] if num_steps > first else [])
        return make_accountant("pld").epsilon(history.extended(plan), DELTA)

    assert spent(allowed) <= 6.0 < spent(allowed + 1)


def test_max_steps_ends():
    runs = constant(0.05, 100)(2.0)

    def allowed(epsilon, history):
        return max_steps_within(
            epsilon=epsilon, delta=DELTA, accountant=make_accountant("pld"), history=history, runs=runs
        )

    assert allowed(50.0, Ledger()) == 100
    assert allowed(0.1, Ledger().extended(constant(0.5, 100)(1.0))) == 0
    with pytest.raises(ValueError, match="epsilon < inf, got epsilon=nan"):
        allowed(math.nan, Ledger())


def test_max_steps_of_shuffled_passes_stops_at_the_end_of_a_pass():
    runs = [(PrivacyEvent.shuffle(noise_multiplier=2.0), 100, 10)]
    accountant = make_accountant("gdp")
    four = accountant.epsilon(Ledger().extended([(PrivacyEvent.gaussian(noise_multiplier=2.0), 4)]), DELTA)
    assert max_steps_within(epsilon=four, delta=DELTA, accountant=accountant, history=Ledger(), runs=runs) == 40
