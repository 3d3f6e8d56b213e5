"""Truncated concentrated accounting: its closed forms, where it refuses, that it is a bound, and calibration with
it.
"""

import math

import numpy as np
import pytest

from lightning_dp.accounting import (
    Ledger,
    PrivacyEvent,
    TCDPAccountant,
    calibrate_noise_multiplier,
    make_accountant,
    max_steps_within,
    tcdp_epsilon,
)

DELTA = 1e-5
LOG = math.log(1e5)


def poisson(noise_multiplier, sample_rate):
    return PrivacyEvent.poisson(noise_multiplier=noise_multiplier, sample_rate=sample_rate)


def epsilon(*runs, delta=DELTA, relation="add_or_remove_one"):
    return TCDPAccountant().epsilon(Ledger(relation).extended(runs), delta)


def over_orders(rho, omega, delta):
    """The conversion as what it is: the best order below omega, on a fine grid."""
    orders = [1 + (min(omega, 1e4) - 1) * (i / 20_000) ** 3 for i in range(1, 20_001)]
    return min(rho * a + math.log(1 / delta) / (a - 1) for a in orders)


def test_gaussian_is_zero_concentrated():
    # rho = 1 / 50
    assert epsilon((PrivacyEvent.gaussian(noise_multiplier=5.0), 1)) == pytest.approx(
        0.02 + 2 * math.sqrt(0.02 * LOG), rel=1e-12
    )
    # four of them, and one of another multiplier: rho = 4 / 50 + 1 / 2
    runs = [(PrivacyEvent.gaussian(noise_multiplier=5.0), 4), (PrivacyEvent.gaussian(noise_multiplier=1.0), 1)]
    assert epsilon(*runs) == pytest.approx(0.58 + 2 * math.sqrt(0.58 * LOG), rel=1e-12)


def test_sampled_releases_add_up_step_by_step():
    # rho' = 10,000 x 13 x 1e-4 / 32 = 0.40625; omega = log(100) x 8 = 36.8: far enough for the best order, 6.3
    assert epsilon((poisson(4.0, 0.01), 10_000)) == pytest.approx(0.40625 + 2 * math.sqrt(0.40625 * LOG), rel=1e-12)
    # half as many: an epoch is not a step
    assert epsilon((poisson(4.0, 0.01), 5_000)) == pytest.approx(0.203125 + 2 * math.sqrt(0.203125 * LOG), rel=1e-12)


def test_truncation_decides_if_the_best_order_exceeds_omega():
    # rho' = 13 x 0.0025 x 0.08 = 0.0026; omega = log(20) / 0.32 = 9.3617; (omega - 1)^2 rho' = 0.182 < 11.5
    omega = math.log(20) / 0.32
    assert epsilon((poisson(2.5, 0.05), 1)) == pytest.approx(0.0026 * omega + LOG / (omega - 1), rel=1e-12)
    assert epsilon((poisson(2.5, 0.05), 1)) > 0.0026 + 2 * math.sqrt(0.0026 * LOG)


def test_composition_takes_smallest_omega_and_all_rhos():
    # rho: 13 x 0.0025 x 0.08, 100 x 13 x 1e-4 / 18, 2 / 200; omega: 9.3617, 20.7, none
    runs = [(poisson(2.5, 0.05), 1), (poisson(3.0, 0.01), 100), (PrivacyEvent.gaussian(noise_multiplier=10.0), 2)]
    rho, omega = 0.0026 + 0.13 / 18 + 0.01, math.log(20) / 0.32
    assert epsilon(*runs) == pytest.approx(rho * omega + LOG / (omega - 1), rel=1e-12)
    assert epsilon(*reversed(runs)) == pytest.approx(epsilon(*runs), rel=1e-12)


@pytest.mark.parametrize("rho", [1e-4, 0.02, 0.5, 30.0])
@pytest.mark.parametrize("omega", [1.5, 6.0, 40.0, math.inf])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.3])
@pytest.mark.one_in(4)
def test_conversion_is_the_best_order(rho, omega, delta):
    assert tcdp_epsilon(rho, omega, delta) == pytest.approx(over_orders(rho, omega, delta), rel=1e-3)


def test_conversion_of_nothing_is_zero():
    assert tcdp_epsilon(0.0, math.inf, DELTA) == 0.0


@pytest.mark.parametrize("omega", [1.0, 0.5, -math.inf, math.nan])
def test_conversion_refuses_omega_that_bounds_no_order(omega):
    with pytest.raises(ValueError, match=f"omega > 1, got omega={omega}"):
        tcdp_epsilon(0.1, omega, DELTA)


@pytest.mark.parametrize("rho", [-0.1, math.inf, math.nan])
def test_conversion_refuses_rho_out_of_range(rho):
    with pytest.raises(ValueError, match=f"rho < inf, got rho={rho}"):
        tcdp_epsilon(rho, 6.0, DELTA)


def test_conversion_refuses_delta_out_of_range():
    with pytest.raises(ValueError, match="0 < delta < 1, got delta=nan"):
        tcdp_epsilon(0.1, 6.0, math.nan)


CASES = [
    (rate, sigma, steps)
    for rate in (1e-4, 1e-3, 0.01, 0.1)
    for sigma in (2.2361, 3.0, 6.0, 20.0)
    for steps in (1, 100, 10_000)
]


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.one_in(4)
def test_never_below_the_privacy_loss_distribution(case):
    rate, sigma, steps = case
    for delta in (1e-5, 1e-9):
        tight = make_accountant("pld").epsilon(Ledger().extended([(poisson(sigma, rate), steps)]), delta)
        assert epsilon((poisson(sigma, rate), steps), delta=delta) >= tight


def divergence(rate, sigma, order, direction):
    """Rényi divergence between a Poisson-sampled Gaussian and one without the record, summed on a fine grid."""
    x = np.linspace(-40 * sigma, order + 40 * sigma, 400_001)
    log_base = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    loss = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * sigma**2))
    exponent = log_base + (order if direction == "remove" else 1 - order) * loss
    highest = exponent.max()
    return (highest + math.log(np.exp(exponent - highest).sum() * (x[1] - x[0]))) / (order - 1)


@pytest.mark.parametrize("rate", [1e-3, 0.01, 0.1])
@pytest.mark.parametrize("sigma", [2.2361, 3.0, 6.0, 20.0])
@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.one_in(3)
def test_lemma_bounds_divergences_of_a_sampled_gaussian(rate, sigma, direction):
    """Up to omega, in both directions; 13 is not wasteful by more than its share: 1 would not do."""
    rho = 1 / (2 * sigma**2)
    omega = math.log(1 / rate) / (4 * rho)
    for order in (1.1, 1.5, 2.0, 4.0, omega / 2, omega * 0.999):
        assert divergence(rate, sigma, order, direction) <= 13 * rate**2 * rho * order + 1e-12
    if direction == "remove":
        assert divergence(rate, sigma, 2.0, direction) > rate**2 * rho * 2


@pytest.mark.parametrize("sigma", [2.23, 1.0, 0.1])
def test_too_little_noise_under_sampling_is_refused(sigma):
    with pytest.raises(ValueError, match=rf"noise_multiplier >= 2\.24.*got noise_multiplier={sigma} \(rho="):
        epsilon((poisson(5.0, 0.01), 10), (poisson(sigma, 0.01), 1))
    assert epsilon((poisson(sigma, 1.0), 1)) == epsilon((PrivacyEvent.gaussian(noise_multiplier=sigma), 1)) < math.inf


@pytest.mark.parametrize("rate", [0.101, 0.5, 0.999])
def test_sampling_too_often_is_refused(rate):
    with pytest.raises(ValueError, match=rf"sample_rate <= 0\.1.*got sample_rate={rate}"):
        epsilon((poisson(5.0, rate), 1))
    assert epsilon((poisson(5.0, 0.1), 1)) < math.inf


def test_poisson_under_replace_one_is_refused():
    with pytest.raises(ValueError, match=r'"replace_one", got accountant=.tcdp.*Use accountant="pld"'):
        epsilon((poisson(5.0, 0.01), 1), relation="replace_one")


def test_epsilon_or_inf_is_infinite_only_where_more_noise_helps():
    def search(*runs):
        return TCDPAccountant().epsilon_or_inf(Ledger().extended(runs), DELTA)

    assert search((poisson(2.23, 0.01), 1)) == math.inf
    assert search((poisson(0.0, 0.01), 1)) == math.inf
    assert search((poisson(5.0, 0.01), 1)) == epsilon((poisson(5.0, 0.01), 1))
    unsampled = (PrivacyEvent.gaussian(noise_multiplier=0.5), 1)
    assert search(unsampled) == epsilon(unsampled)
    with pytest.raises(ValueError, match=r"sample_rate <= 0\.1"):
        search((poisson(5.0, 0.5), 1))


def calibrate(target, runs, history=None):
    return calibrate_noise_multiplier(
        target_epsilon=target,
        delta=DELTA,
        accountant=TCDPAccountant(),
        runs=runs,
        history=Ledger() if history is None else history,
    )


@pytest.mark.parametrize("target", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(0.01, 10_000), (0.1, 1000)])
def test_calibration_is_close_below_the_target(target, shape):
    rate, steps = shape
    sigma = calibrate(target, lambda sigma: [(poisson(sigma, rate), steps)])
    assert 0.99 * target <= epsilon((poisson(sigma, rate), steps)) <= target
    assert epsilon((poisson(sigma * 0.98, rate), steps)) > target


def test_calibrated_last_plateau_stays_within_the_lemma():
    def runs(sigma):
        return [(poisson(sigma * 0.8**plateau, 0.01), 2500) for plateau in range(4)]

    sigma = calibrate(3.0, runs)
    assert sigma * 0.8**3 > math.sqrt(5)
    assert 0.99 * 3.0 <= epsilon(*runs(sigma)) <= 3.0


def test_calibration_beyond_the_lemma_gives_its_least_noise():
    sigma = calibrate(20.0, lambda sigma: [(poisson(sigma, 0.01), 100)])
    assert math.sqrt(5) <= sigma < math.sqrt(5) * (1 + 1e-6)
    assert epsilon((poisson(sigma, 0.01), 100)) < 20.0


def test_calibration_without_a_bound_says_why():
    with pytest.raises(ValueError, match=r"sample_rate <= 0\.1"):
        calibrate(3.0, lambda sigma: [(poisson(sigma, 0.5), 100)])
    history = Ledger().extended([(poisson(1.0, 0.01), 1)])
    with pytest.raises(ValueError, match=r"noise_multiplier >= 2\.24"):
        calibrate(3.0, lambda sigma: [(poisson(sigma, 0.01), 100)], history)


def test_max_steps_refuse_a_plan_beyond_the_lemma():
    with pytest.raises(ValueError, match=r"noise_multiplier >= 2\.24"):
        max_steps_within(
            epsilon=3.0, delta=DELTA, accountant=TCDPAccountant(), history=Ledger(), runs=[(poisson(1.0, 0.01), 10)]
        )
