"""Bounds on attacks: exact where the truth is known, reached by the best attack, and never below what one achieves."""

import math

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from lightning_dp.accounting import Ledger, PLDAccountant, PrivacyEvent, attack_bounds, make_accountant
from tests.cases import each

RATES = (0.0, 1e-5, 1e-3, 1e-2, 0.1, 0.5, 0.99, 1.0)


def poisson(sigma, rate):
    return PrivacyEvent.poisson(noise_multiplier=sigma, sample_rate=rate)


def bounds_of(*runs, rates=RATES, relation="add_or_remove_one"):
    return attack_bounds(Ledger(relation).extended(runs), rates)


def gaussian_power(mu, rates=RATES):
    return ndtr(ndtri(np.array(rates)) + mu)


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_gaussian_trade_off_is_exact(mu):
    runs = [(PrivacyEvent.gaussian(noise_multiplier=2 / mu), 2), (PrivacyEvent.shuffle(noise_multiplier=2 / mu), 20, 2)]
    bounds = bounds_of(*runs)
    assert bounds.true_positive_rates == pytest.approx(gaussian_power(mu), rel=1e-12)
    assert bounds.advantage == pytest.approx(2 * ndtr(mu / 2) - 1, rel=1e-12)
    for wrong in (2 / 3, 3 / 2):
        assert bounds.true_positive_rates != pytest.approx(gaussian_power(mu * wrong), rel=1e-2)


@each("mu", [0.1, 1.0, 3.0])
@each("steps", [1, 100])
@each("relation", ["add_or_remove_one", "replace_one"])
def test_loss_distribution_meets_the_gaussian_trade_off(mu, steps, relation):
    """With rate 1 - 1e-12 the grid is used, and the truth is a Gaussian's."""
    bounds = bounds_of((poisson(math.sqrt(steps) / mu, 1 - 1e-12), steps), relation=relation)
    truth = gaussian_power(mu)
    for bound, exact in zip(bounds.true_positive_rates, truth, strict=True):
        assert exact * (1 - 1e-7) <= bound <= min(1, exact * (1 + 1e-3) + 1e-12)
    assert 2 * ndtr(mu / 2) - 1 - 1e-9 <= bounds.advantage <= (2 * ndtr(mu / 2) - 1) * (1 + 1e-3)


@pytest.mark.parametrize(("sigma", "rate"), [(0.5, 0.1), (1.0, 0.01), (2.0, 0.5)])
def test_one_sampled_step_meets_the_best_test(sigma, rate):
    """Neyman and Pearson: the likelihood ratio rises with the release, so the best tests are thresholds."""
    bounds = bounds_of((poisson(sigma, rate), 1))
    thresholds = np.linspace(-8 * sigma, 1 + 8 * sigma, 400_001)
    without, within = (
        ndtr(-thresholds / sigma),
        (1 - rate) * ndtr(-thresholds / sigma) + rate * ndtr((1 - thresholds) / sigma),
    )
    for false_positives, bound in zip(RATES[1:-1], bounds.true_positive_rates[1:-1], strict=True):
        claims_in = np.interp(-false_positives, -without, within)
        claims_out = np.interp(false_positives, 1 - within, 1 - without)
        truth = max(claims_in, claims_out)
        assert truth * (1 - 1e-5) <= bound <= truth * (1 + 2e-3)
    assert bounds.advantage == pytest.approx((within - without).max(), rel=1e-3)


@pytest.mark.parametrize("kind", ["poisson", "allocation"])
def test_drawn_attacks_reach_the_bound_and_never_exceed_it(kind):
    """The likelihood-ratio attack on 200,000 drawn runs of 12 steps; 5.3 standard errors (false-alarm rate 1e-7)."""
    rng, num_runs, steps, false_positives = np.random.default_rng(5), 200_000, 12, 0.01

    def losses(sigma, present):
        noise = rng.normal(0, sigma, (num_runs, steps))
        if kind == "poisson":
            noise += present * (rng.random((num_runs, steps)) < 0.25)
            return np.log(0.75 + 0.25 * np.exp((noise - 0.5) / sigma**2)).sum(axis=1)
        for first in (0, 4, 8):
            noise[np.arange(num_runs), first + rng.integers(4, size=num_runs)] += present
        ratios = np.exp((noise - 0.5) / sigma**2).reshape(num_runs, 3, 4).mean(axis=2)
        return np.log(ratios).sum(axis=1)

    def best_rate(sigma):
        present, absent = losses(sigma, True), losses(sigma, False)
        claims_in = np.mean(present > np.quantile(absent, 1 - false_positives))
        claims_out = np.mean(absent < np.quantile(present, false_positives))
        return max(claims_in, claims_out)

    sigma = 0.8
    event = (
        poisson(sigma, 0.25) if kind == "poisson" else PrivacyEvent.allocation(noise_multiplier=sigma, num_batches=4)
    )
    (bound,) = bounds_of((event, steps), rates=(false_positives,)).true_positive_rates
    slack = (
        5.3 * math.sqrt(bound / num_runs) * 4
    )  # of the rate, and of the threshold whose slope is about bound / 0.01 / 3
    for factor in (2 / 3, 1.0, 3 / 2):
        assert (bound - slack < best_rate(sigma * factor) < bound + slack) == (factor == 1.0)


@pytest.mark.parametrize("event", [poisson(1.0, 0.05), PrivacyEvent.allocation(noise_multiplier=1.0, num_batches=20)])
def test_bounds_follow_from_the_same_loss_as_epsilon(event):
    ledger = Ledger().extended([(event, 100)])
    accountant = PLDAccountant()
    bounds = attack_bounds(ledger, RATES, accountant=accountant)
    assert list(bounds.true_positive_rates) == sorted(bounds.true_positive_rates)
    for delta in (1e-5, 1e-2):
        epsilon = accountant.epsilon(ledger, delta)
        for wrong, right in zip(RATES, bounds.true_positive_rates, strict=True):
            assert wrong <= right <= min(1, math.exp(epsilon) * wrong + delta) + 1e-12
    assert bounds.advantage == pytest.approx(max(np.subtract(bounds.true_positive_rates, RATES)), rel=0.2)
    assert bounds.advantage >= max(np.subtract(bounds.true_positive_rates, RATES)) - 1e-9
    assert make_accountant("pld").epsilon(ledger, bounds.advantage * (1 + 1e-6)) == 0
    assert make_accountant("pld").epsilon(ledger, bounds.advantage * (1 - 1e-3)) > 0


def test_nothing_and_everything():
    assert bounds_of().true_positive_rates == RATES
    assert bounds_of().advantage == 0
    for run in ((poisson(0.0, 0.1), 1), (PrivacyEvent.non_private("no clipping"), 1)):
        bounds = bounds_of((poisson(1.0, 0.1), 5), run)
        assert (set(bounds.true_positive_rates), bounds.advantage) == ({1.0}, 1.0)
    # a record that no noise hides is missed where it joined none of three batches
    rarely_absent = bounds_of((poisson(0.02, 0.9), 3), rates=(5e-4,))
    assert rarely_absent.true_positive_rates[0] == pytest.approx(1 - 1e-3 * (1 - 5e-4), abs=1e-6)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match=f"0 <= false positive rate <= 1, got {rate}"):
        bounds_of(rates=(rate,))
