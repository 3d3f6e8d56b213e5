"""Passes under random allocation: the law of their likelihood ratio, the table of reference, and what composes with
them.
"""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import norm

from lightning_dp.accounting import (
    ACCOUNTANTS,
    Ledger,
    Mechanism,
    PLDAccountant,
    PrivacyEvent,
    RDPAccountant,
    calibrate_noise_multiplier,
    first_steps,
    gaussian_epsilon,
    make_accountant,
    max_steps_within,
)
from lightning_dp.accounting.allocation import LEAST_NOISE, allocation_law
from lightning_dp.accounting.rdp import divergences_of
from tests.accounting.allocation_reference import LowerLaw, delta_of_two_batches, sampled_delta, sampled_ratios

DELTA = 1e-5
DIRECTIONS = ("remove", "add")


def allocation(sigma, num_batches):
    return PrivacyEvent.allocation(noise_multiplier=sigma, num_batches=num_batches)


def passes_of(sigma, num_batches, passes=1):
    return (allocation(sigma, num_batches), num_batches * passes, passes)


def composed(*runs, accountant=None):
    accountant = accountant or PLDAccountant()
    ledger = Ledger().extended(runs)
    losses = accountant.composed_losses(accountant.mechanisms_of(ledger), "add_or_remove_one")
    return dict(zip(DIRECTIONS, losses, strict=True))


def epsilon_of(*runs, name="pld", delta=DELTA):
    return make_accountant(name).epsilon(Ledger().extended(runs), delta)


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
def test_epsilon_is_above_a_less_spread_law_and_close_to_it(sigma, num_batches):
    lower = LowerLaw(sigma, num_batches, 800)
    losses = composed(passes_of(sigma, num_batches))
    for direction in DIRECTIONS:
        truth = lower.epsilon(direction, DELTA)
        assert 0 < truth <= losses[direction].epsilon(DELTA) <= 1.015 * truth
        for wrong in (sigma * 2 / 3, sigma * 3 / 2):
            wrong_epsilon = composed(passes_of(wrong, num_batches))[direction].epsilon(DELTA)
            assert not truth <= wrong_epsilon <= 1.015 * truth


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 1.0), (1.0, 3.0), (0.5, 4.0), (3.0, 0.5), (10.0, 0.1)])
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
def test_law_keeps_mass_and_mean(sigma, num_batches):
    law = allocation_law(sigma, num_batches, 32)
    assert law.masses.min() >= 0
    assert law.masses.sum() + law.at_zero == pytest.approx(1, abs=1e-13)
    assert law.mean == pytest.approx(1, abs=1e-12)
    assert 0 <= law.at_zero < 1e-17
    assert 0 <= law.beyond < 1e-16


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("num_batches", [1, 2, 3, 37, 1000, 10_000])
def test_law_has_the_second_moment_of_the_truth(sigma, num_batches):
    """E S^2 - 1 = (exp(1 / sigma^2) - 1) / t, never less; 2 in 1000 more."""
    law = allocation_law(sigma, num_batches, 32)
    variance = law.masses @ np.expm1(law.log_points) ** 2
    for factor in (2 / 3, 1.0, 3 / 2):
        truth = math.expm1(1 / (sigma * factor) ** 2) / num_batches
        assert (truth <= variance <= 1.002 * truth) == (factor == 1.0)


@pytest.mark.parametrize(("sigma", "num_batches"), [(1.0, 1), (0.3, 2), (1.0, 7), (0.6, 100), (5.0, 1000)])
def test_finer_grids_only_lower_what_is_convex(sigma, num_batches):
    laws = [allocation_law(sigma, num_batches, parts) for parts in (2, 8, 32, 128)]
    levels = np.exp(np.linspace(-2.99, 3.01, 25))
    above = [np.maximum(np.exp(law.log_points) - levels[:, None], 0) @ law.masses for law in laws]
    for coarse, fine in itertools.pairwise(above):
        assert (fine <= coarse + 1e-14).all()
        assert fine.sum() < coarse.sum()


@pytest.mark.parametrize("case", [(1.0, 7, 1), (0.6, 100, 3), (5.0, 1000, 4)], ids=repr)
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


def test_query_by_query_agrees_with_a_new_accountant():
    accountant, ledger = PLDAccountant(), Ledger()
    for number in range(12):
        ledger.start_pass()
        ledger.record(allocation(1.0 + 0.1 * (number // 4), 20), 20)
        epsilon = accountant.epsilon(ledger, DELTA)
        assert epsilon == pytest.approx(PLDAccountant().epsilon(ledger, DELTA), rel=1e-9)


@pytest.mark.parametrize("target", [0.05, 1.0, 8.0])
@pytest.mark.parametrize(("num_batches", "passes"), [(10, 1), (100, 20)])
@pytest.mark.parametrize("name", ["pld", "rdp"])
def test_calibration_is_close_below_the_target(target, num_batches, passes, name):
    def runs(sigma):
        return [passes_of(sigma, num_batches, passes)]

    sigma = calibrate_noise_multiplier(
        target_epsilon=target, delta=DELTA, accountant=make_accountant(name), runs=runs, history=Ledger()
    )
    assert 0.99 * target <= epsilon_of(*runs(sigma), name=name) <= target
    assert epsilon_of(*runs(sigma * 0.98), name=name) > target


def test_calibration_of_a_schedule_of_passes():
    def runs(sigma):
        return [passes_of(sigma * 0.9**number, 50) for number in range(6)]

    history = Ledger().extended([passes_of(1.0, 50)])
    sigma = calibrate_noise_multiplier(
        target_epsilon=3.0, delta=DELTA, accountant=PLDAccountant(), runs=runs, history=history
    )
    assert 2.97 <= PLDAccountant().epsilon(history.extended(runs(sigma)), DELTA) <= 3.0


def test_max_steps_stop_at_the_end_of_a_pass():
    four = epsilon_of(passes_of(1.0, 10, 4))
    found = max_steps_within(
        epsilon=four, delta=DELTA, accountant=PLDAccountant(), history=Ledger(), runs=[passes_of(1.0, 10, 9)]
    )
    assert found == 40
    assert first_steps([passes_of(1.0, 10, 9)], 41) == [(allocation(1.0, 10), 41, 5)]


@pytest.mark.parametrize("name", [name for name in ACCOUNTANTS if name not in ("pld", "rdp")])
def test_other_accountants_count_a_pass_as_one_gaussian(name):
    gaussians = (PrivacyEvent.gaussian(noise_multiplier=3.0), 4)
    assert epsilon_of(passes_of(3.0, 20, 4), name=name) == epsilon_of(gaussians, name=name)
    ledger = Ledger().extended([passes_of(3.0, 20, 4)])
    assert make_accountant(name).epsilon_or_inf(ledger, DELTA) == epsilon_of(gaussians, name=name)


def test_rdp_gives_the_published_bound_which_is_loose():
    assert epsilon_of(passes_of(1.0, 100), name="rdp") == pytest.approx(1.166, abs=5e-4)
    for case in [(1.0, 2, 1), (0.5, 10, 3), (3.0, 1000, 5), (50.0, 100, 200), (0.3, 10_000, 1)]:
        assert epsilon_of(passes_of(*case), name="rdp") > epsilon_of(passes_of(*case))
        gaussian = (PrivacyEvent.gaussian(noise_multiplier=case[0]), case[2])
        assert epsilon_of(passes_of(*case), name="rdp") <= epsilon_of(gaussian, name="rdp") * (1 + 1e-9)


@pytest.mark.parametrize(("sigma", "num_batches"), [(1.0, 2), (2.0, 5), (1.0, 100), (8.0, 10_000)])
def test_rdp_bounds_the_divergences_of_a_pass(sigma, num_batches):
    """Exact at integers, from above between them, and from above for "add"; low orders, which the law's grid covers."""
    law = allocation_law(sigma, num_batches, 256)
    bounds = divergences_of(Mechanism(1 / num_batches, sigma, num_batches))
    for order in (1.5, 2.0, 2.5, 3.0, 4.0):
        remove, add = bounds[:, int(np.flatnonzero(np.isclose(RDPAccountant.orders, order))[0])]
        truth = math.log(law.masses @ np.exp(order * law.log_points)) / (order - 1)
        assert truth * (1 - 1e-3) <= remove <= truth * (1.001 if order == int(order) else 1.5)
        assert add >= math.log(law.masses @ np.exp((1 - order) * law.log_points)) / (order - 1) * (1 - 1e-3)
        second = math.log1p(math.expm1(1 / sigma**2) / num_batches)
        assert order != 2.0 or remove == pytest.approx(second, rel=1e-9)


def test_tiny_delta_is_bounded_by_renyi_divergences():
    run = passes_of(1.0, 10, 2)
    assert epsilon_of(run, delta=1e-30) == epsilon_of(run, name="rdp", delta=1e-30) < math.inf


def test_relations_that_exchange_a_record_are_not_amplified():
    with pytest.raises(
        ValueError, match=r'kind="allocation", got neighboring_relation="replace_one"\. Record kind="shuffle"'
    ):
        Ledger("replace_one").record(allocation(1.0, 10))
    with pytest.raises(ValueError, match='got neighboring_relation="replace_one"'):
        Ledger("replace_one").extended([passes_of(1.0, 10, 3)])
