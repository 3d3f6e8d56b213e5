"""Passes under random allocation: the law of their likelihood ratio, the table of reference, and what composes with
them.
"""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import norm

from lightning_dp.accounting import PLDAccountant, PrivacyEvent, gaussian_epsilon
from lightning_dp.accounting.allocation import LEAST_NOISE, allocation_law
from tests.accounting.allocation_reference import (
    DELTA,
    DIRECTIONS,
    LowerLaw,
    allocation,
    composed,
    delta_of_two_batches,
    epsilon_of,
    passes_of,
    sampled_delta,
    sampled_ratios,
)

# noise multiplier, batches, passes, remove, add, Poisson at the same steps: on a grid of 0.004, to about 0.5 %
TABLE = [
    (1, 2, 1, 3.697, 3.080, None),
    (1, 10, 1, 2.189, 1.365, None),
    (1, 100, 1, 0.6211, 0.4221, 0.7180),
    (1, 1000, 1, 0.139, 0.127, 0.1490),
    (2, 100, 10, 0.6045, 0.6004, 0.6220),
    (1.5, 100, 10, 0.879, 0.864, 0.9176),
    (0.8143, 100, 10, 2.771, 2.186, 3.000),
    (0.5888, 100, 10, 7.24, 4.13, 8.00),
]


@pytest.mark.parametrize("row", TABLE, ids=repr)
def test_epsilon_meets_the_reference_table(row):
    """Where ours is lower it is so by a finer grid: never below the law that is certainly less spread."""
    sigma, num_batches, passes, remove, add, poisson = row
    losses = composed(passes_of(sigma, num_batches, passes))
    for direction, expected in (("remove", remove), ("add", add)):
        assert losses[direction].epsilon(DELTA) == pytest.approx(expected, rel=6e-3)
    epsilon = epsilon_of(passes_of(sigma, num_batches, passes))
    assert epsilon == max(loss.epsilon(DELTA) for loss in losses.values())
    if poisson is not None:
        event = PrivacyEvent.poisson(noise_multiplier=sigma, sample_rate=1 / num_batches)
        assert epsilon < epsilon_of((event, num_batches * passes)) == pytest.approx(poisson, rel=0.015)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("num_batches", [3, 100, 10_000])
@pytest.mark.one_in(4)
def test_epsilon_is_above_a_less_spread_law_and_close_to_it(sigma, num_batches):
    lower = LowerLaw(sigma, num_batches, 800)
    truth = {direction: lower.epsilon(direction, DELTA) for direction in DIRECTIONS}
    assert min(truth.values()) > 0
    for factor in (2 / 3, 1.0, 3 / 2):
        for direction, loss in composed(passes_of(sigma * factor, num_batches)).items():
            assert (truth[direction] <= loss.epsilon(DELTA) <= 1.015 * truth[direction]) == (factor == 1.0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 1.0), (1.0, 3.0), (0.5, 4.0), (3.0, 0.5), (10.0, 0.1)])
@pytest.mark.one_in(2)
def test_two_batches_meet_numerical_integration(sigma, epsilon, direction):
    truth = delta_of_two_batches(sigma, direction, epsilon)
    figures = {
        (1.0, "remove"): 0.0592065,
        (1.0, "add"): 0.0501977,
        (3.0, "remove"): 1.67703e-4,
        (3.0, "add"): 1.59026e-5,
    }
    if sigma == 1.0:
        assert truth == pytest.approx(figures[epsilon, direction], rel=1e-5)
    for parts, slack in ((32, 2e-3), (256, 3e-5)):
        law = allocation_law(sigma, 2, parts)
        if direction == "remove":
            delta = law.masses @ np.maximum(np.exp(law.log_points) - math.exp(epsilon), 0)
        else:
            delta = law.masses @ np.maximum(1 - np.exp(law.log_points + epsilon), 0)
        assert truth * (1 - 1e-7) <= delta <= truth * (1 + slack)


LAWS = list(itertools.product([LEAST_NOISE, 0.3, 1.0, 2.0, 50.0, 1e9], [1, 2, 3, 37, 1000, 10_000]))


@pytest.mark.parametrize(("sigma", "num_batches"), LAWS)
@pytest.mark.one_in(4)
def test_law_keeps_mass_and_mean(sigma, num_batches):
    law = allocation_law(sigma, num_batches, 32)
    assert law.masses.min() >= 0
    assert law.masses.sum() + law.at_zero == pytest.approx(1, abs=1e-13)
    assert law.mean == pytest.approx(1, abs=1e-12)
    assert 0 <= law.at_zero < 1e-17
    assert 0 <= law.beyond < 1e-16


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("num_batches", [1, 2, 3, 37, 1000, 10_000])
@pytest.mark.one_in(3)
def test_law_has_the_second_moment_of_the_truth(sigma, num_batches):
    """E S^2 - 1 = (exp(1 / sigma^2) - 1) / t, never less; 2 in 1000 more."""
    law = allocation_law(sigma, num_batches, 32)
    variance = law.masses @ np.expm1(law.log_points) ** 2
    for factor in (2 / 3, 1.0, 3 / 2):
        truth = math.expm1(1 / (sigma * factor) ** 2) / num_batches
        assert (truth <= variance <= 1.002 * truth) == (factor == 1.0)


@pytest.mark.parametrize(("sigma", "num_batches"), [(1.0, 1), (0.3, 2), (1.0, 7), (0.6, 100), (5.0, 1000)])
@pytest.mark.one_in(3)
def test_finer_grids_only_lower_what_is_convex(sigma, num_batches):
    laws = [allocation_law(sigma, num_batches, parts) for parts in (2, 8, 32, 128)]
    levels = np.exp(np.linspace(-2.99, 3.01, 25))
    above = [np.maximum(np.exp(law.log_points) - levels[:, None], 0) @ law.masses for law in laws]
    for coarse, fine in itertools.pairwise(above):
        assert (fine <= coarse + 1e-14).all()
        assert fine.sum() < coarse.sum()


@pytest.mark.parametrize("case", [(1.0, 7, 1), (0.6, 100, 3), (5.0, 1000, 4)], ids=repr)
@pytest.mark.one_in(3)
def test_finer_grids_only_lower_epsilon(case):
    epsilons = [
        [
            loss.epsilon(DELTA)
            for loss in composed(passes_of(*case), accountant=PLDAccountant(step_parts=parts)).values()
        ]
        for parts in (2, 8, 32, 128)
    ]
    for coarse, fine in itertools.pairwise(epsilons):
        assert all(b < a for a, b in zip(coarse, fine, strict=True))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 7.0])
def test_pass_of_one_batch_is_a_gaussian(sigma):
    assert epsilon_of((allocation(sigma, 1), 5)) == epsilon_of((PrivacyEvent.gaussian(noise_multiplier=sigma), 5))
    law = allocation_law(sigma, 1, 32)
    for epsilon in (0.1 / sigma, 1 / sigma, 3 / sigma):
        gaussian = norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(
            -0.5 / sigma - epsilon * sigma
        )
        remove = law.masses @ np.maximum(np.exp(law.log_points) - math.exp(epsilon), 0)
        add = law.masses @ np.maximum(1 - np.exp(law.log_points + epsilon), 0)
        for delta in (remove, add):
            assert gaussian * (1 - 1e-7) <= delta <= gaussian * (1 + 2e-3)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("sigma", "num_batches", "passes", "epsilon"), [(1.0, 10, 1, 0.6), (0.8, 6, 5, 3.0), (1.5, 4, 8, 2.0)]
)
@pytest.mark.one_in(4)
def test_divergence_is_that_of_drawn_passes(sigma, num_batches, passes, epsilon, direction):
    """200,000 draws, 5.3 standard errors (false-alarm rate 1e-7)."""
    ratios = sampled_ratios(sigma, num_batches, passes, 200_000, np.random.default_rng(7))
    mean, error = sampled_delta(ratios, direction, epsilon)
    for factor in (2 / 3, 1.0, 3 / 2):
        loss = composed(passes_of(sigma * factor, num_batches, passes))[direction]
        delta = np.interp(math.exp(epsilon), np.exp(_losses(loss)), loss.divergences)
        assert (abs(delta - mean) < 5.3 * error + 2e-3 * mean) == (factor == 1.0)


def _losses(loss):
    return (loss.offset + np.arange(loss.masses.size)) * loss.interval


def test_published_closed_form_for_add_holds_for_one_pass_only():
    """S is at least exp of the mean of its t exponents, so the add loss is at most a Gaussian's plus a constant.

    The published form composes the Gaussian over passes and leaves the constant what it is for one.
    """

    def published(sigma, num_batches, passes, delta):
        mu = math.sqrt(passes / num_batches) / sigma
        return gaussian_epsilon(mu, delta) + (1 - 1 / num_batches) / (2 * sigma**2)

    for sigma, num_batches in ((0.5, 4), (1.0, 100), (3.0, 1000)):
        add = composed(passes_of(sigma, num_batches))["add"]
        assert add.epsilon(DELTA) <= published(sigma, num_batches, 1, DELTA)
    sigma, num_batches, passes, delta = 1.0, 5, 20, 0.01
    claimed = published(sigma, num_batches, passes, delta)
    mean, error = sampled_delta(
        sampled_ratios(sigma, num_batches, passes, 200_000, np.random.default_rng(3)), "add", claimed
    )
    assert mean - 5.3 * error > 1.3 * delta  # the claim is false
    assert composed(passes_of(sigma, num_batches, passes))["add"].epsilon(delta) > 1.1 * claimed


@pytest.mark.parametrize("sigma", [0.3, 1.0, 50.0])
@pytest.mark.parametrize("num_batches", [2, 10_000])
@pytest.mark.parametrize("passes", [1, 200])
def test_extremes_are_between_nothing_and_no_amplification(sigma, num_batches, passes):
    epsilon = epsilon_of(passes_of(sigma, num_batches, passes))
    assert 0 < epsilon < epsilon_of(passes_of(sigma, num_batches, passes), name="gdp")


@pytest.mark.parametrize("sigma", [LEAST_NOISE, LEAST_NOISE * 0.999, 1e-3])
def test_tiny_noise_is_bounded_by_a_gaussian(sigma):
    epsilon, gaussian = epsilon_of(passes_of(sigma, 4)), epsilon_of(passes_of(sigma, 4), name="gdp")
    assert gaussian - math.log(4) - 0.1 < epsilon <= gaussian
    assert (epsilon == gaussian) == (sigma < LEAST_NOISE)


def test_passes_compose_with_gaussians_and_poisson_samples():
    """Against the sum over the law of a pass of the closed divergence of the other release."""
    law = allocation_law(1.0, 4, 256)
    for mu, other in (
        (0.5, PrivacyEvent.gaussian(noise_multiplier=2.0)),
        (0.5, PrivacyEvent.poisson(noise_multiplier=2.0, sample_rate=1 - 1e-12)),
    ):
        losses = composed(passes_of(1.0, 4), (other, 1))
        for epsilon in (0.3, 1.5, 3.0):
            for direction, sign in (("remove", 1), ("add", -1)):
                masses = law.masses * (np.exp(law.log_points) if sign > 0 else 1)
                rest = (epsilon - sign * law.log_points) / mu
                truth = masses @ (norm.cdf(mu / 2 - rest) - np.exp(rest * mu) * norm.cdf(-mu / 2 - rest))
                loss = losses[direction]
                delta = np.interp(math.exp(epsilon), np.exp(_losses(loss)), loss.divergences)
                assert truth * (1 - 1e-6) <= delta <= truth * (1 + 2e-3)
    whole = epsilon_of(passes_of(1.0, 4, 2), (PrivacyEvent.poisson(noise_multiplier=1.0, sample_rate=0.1), 30))
    assert whole > max(
        epsilon_of(passes_of(1.0, 4, 2)), epsilon_of((PrivacyEvent.poisson(noise_multiplier=1.0, sample_rate=0.1), 30))
    )


@pytest.mark.parametrize("delta", [1e-3, 1e-9, 1e-12])
def test_epsilon_holds_for_other_deltas(delta):
    lower, losses = LowerLaw(1.0, 50, 800), composed(passes_of(1.0, 50))
    for direction in DIRECTIONS:
        truth = lower.epsilon(direction, delta)
        assert truth <= losses[direction].epsilon(delta) <= (1.01 if delta > 1e-10 else 1.05) * truth
