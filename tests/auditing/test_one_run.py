"""Bounds from one run: published values, exact error probabilities, and what breaks them."""

from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest
from scipy.special import expit, ndtr
from scipy.stats import binom, norm

from lightning_dp.accounting import Ledger, PLDAccountant, PrivacyEvent, gaussian_epsilon
from lightning_dp.auditing import (
    epsilon_noise_scale,
    epsilon_one_run,
    epsilon_one_run_all_thresholds,
    epsilon_one_run_gdp,
    mislabelled,
    random_records,
)
from lightning_dp.auditing.estimates import operating_points
from lightning_dp.auditing.noise_scale import scaled_ledger
from lightning_dp.auditing.one_run import epsilon_of_counts, mu_of_counts, one_run_gdp_gap, one_run_p_value
from tests.cases import each

MODULES = ("estimates", "one_run", "noise_scale", "canaries", "records", "result")


def quantiles(num: int) -> np.ndarray:
    """Scores without chance: N(0, 1) at (i + 1/2) / num."""
    return norm.ppf((np.arange(num) + 0.5) / num)


def gaussian_ledger(mu: float) -> Ledger:
    ledger = Ledger()
    ledger.record(PrivacyEvent.gaussian(noise_multiplier=1 / mu))
    return ledger


@pytest.mark.parametrize(("shift", "published"), [(0, 0.0), (1, 1.13346), (2, 2.311945), (4, 4.395568)])
@pytest.mark.one_in(2)
def test_one_run_gives_the_published_values(shift: int, published: float) -> None:
    """jax_privacy's tests: 10,000 scores in and 10,000 out at the quantiles of a Gaussian, p = .05, delta 1e-6."""
    out = quantiles(10_000)
    found = epsilon_one_run_all_thresholds(out + shift, out, delta=1e-6, confidence=0.95)
    assert round(found, 6 if shift > 1 else 5) == published


@pytest.mark.parametrize(("shift", "published"), [(1, 2.164749), (2, 4.7218075), (4, 9.133752)])
def test_the_gaussian_hypothesis_gives_the_published_values(shift: int, published: float) -> None:
    """The same scores against mu-GDP; of the corners the most precise, among them the best."""
    out = quantiles(10_000)
    points = operating_points(out + shift, out)
    precise = sorted(points[1:], key=lambda point: -point[0] / sum(point))[:30]
    mus = [mu_of_counts(20_000, tp + fp, tp, significance=0.05 / len(points)) for tp, fp in precise]
    assert gaussian_epsilon(max(mus), 1e-6) == pytest.approx(published, rel=1e-5)


def p_value_by_hand(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The formula with sums over the probability mass function."""
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))
    at_least = [sum(binom.pmf(k, r, rate) for k in range(max(start, 0), r + 1)) for start in range(v + 1)]
    slope = max([0.0, *((at_least[v - i] - at_least[v]) / i for i in range(1, v + 1))])
    return min(1.0, at_least[v] + 2 * m * delta * slope)


@each("counts", [(10, 10, 9), (50, 20, 20), (100, 40, 3), (100, 1, 0)])
@each("epsilon", [0.0, 0.5, 3.0])
@each("delta", [0.0, 1e-6, 1e-2, 0.5])
def test_the_p_value_is_the_formula(counts: tuple[int, int, int], epsilon: float, delta: float) -> None:
    assert one_run_p_value(*counts, epsilon, delta) == pytest.approx(
        p_value_by_hand(*counts, epsilon, delta), abs=1e-12
    )


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
@pytest.mark.parametrize("factor", [2 / 3, 1.0, 3 / 2])
@pytest.mark.one_in(2)
def test_randomised_response_is_refuted_as_rarely_as_stated(epsilon: float, factor: float) -> None:
    """Exact, over all counts: each of 400 guesses is right with probability e^eps / (1 + e^eps). At 3/2 of it, almost
    always.
    """
    rate = expit(factor * epsilon)
    refuted = [v for v in range(401) if epsilon_of_counts(400, 400, v, delta=0.0, significance=0.05) > epsilon]
    probability = sum(binom.pmf(refuted, 400, rate))
    assert {2 / 3: probability < 1e-3, 1.0: 0.02 < probability <= 0.05, 3 / 2: probability > 0.4}[factor]


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
@pytest.mark.one_in(3)
def test_gaussian_mechanism_is_refuted_as_rarely_as_stated(mu: float) -> None:
    """Exact: canaries apart, so right guesses are Bin(m, Phi(mu / 2)); both Gaussian bounds; half the noise is
    refuted.
    """
    claimed, num, confidence = gaussian_epsilon(mu, 1e-5), 1000, 0.95
    for scale, limit in ((1.0, 0.05), (0.5, None)):
        counts = np.arange(num + 1)
        mass = binom.pmf(counts, num, ndtr(mu / scale / 2))
        likely = counts[mass > 1e-6]
        refuted = {"scale": 0.0, "one run": 0.0}
        for v in likely:
            coins = np.arange(num) % 2 == 0
            flipped = coins.copy()
            flipped[v:] = ~flipped[v:]
            scores = flipped - 0.5  # v right guesses
            if (
                epsilon_noise_scale(scores, coins, ledger=gaussian_ledger(mu), delta=1e-5, confidence=confidence)
                > claimed
            ):
                refuted["scale"] += mass[v]
            refuted["one run"] += mass[v] * (mu_of_counts(num, num, int(v), significance=0.05) > mu)
        if limit is None:
            assert refuted["scale"] > 0.999
        else:
            assert 0.01 < refuted["scale"] <= limit
            assert refuted["one run"] <= limit


def test_the_gap_grows_with_right_guesses_and_falls_with_mu() -> None:
    gaps = [one_run_gdp_gap(100, 100, v, 1.0, 0.05) for v in (50, 70, 90, 100)]
    assert gaps == sorted(gaps)
    assert one_run_gdp_gap(100, 100, 95, 0.1, 0.05) > 0 > one_run_gdp_gap(100, 100, 95, 5.0, 0.05)


def test_one_run_guesses_the_ends_and_abstains_between() -> None:
    """The best fifth at each end is right, the rest wrong: a share of 0.4 sees only right guesses."""
    scores = np.arange(100.0)
    coins = scores < 50
    coins[:20], coins[80:] = False, True
    narrow = epsilon_one_run(scores, coins, delta=0.0, shares=(0.4,))
    assert narrow == pytest.approx(epsilon_of_counts(100, 40, 40, delta=0.0, significance=0.05), abs=1e-6)
    assert epsilon_one_run(scores, coins, delta=0.0, shares=(1.0,)) == 0.0
    both = epsilon_one_run(scores, coins, delta=0.0, shares=(0.4, 1.0))
    assert both == pytest.approx(epsilon_of_counts(100, 40, 40, delta=0.0, significance=0.025), abs=1e-6)
    assert epsilon_one_run_gdp(scores, coins, delta=1e-5, shares=(0.4, 1.0)) == pytest.approx(
        gaussian_epsilon(mu_of_counts(100, 40, 40, significance=0.025), 1e-5)
    )


def subsampled_ledger(q: float, sigma: float, steps: int) -> Ledger:
    ledger = Ledger()
    ledger.record(PrivacyEvent.poisson(noise_multiplier=sigma, sample_rate=q), steps)
    return ledger


@pytest.mark.parametrize(
    ("noise", "low", "high"), [(1.0, 0.4, 1.0), (3 / 2, 0.05, 0.7), (2 / 3, 1.05, 1.8), (0.5, 1.4, 3.0)]
)
def test_subsampled_releases_are_audited_at_their_own_noise(noise: float, low: float, high: float) -> None:
    """Q = .25, sigma 1, 12 steps, 4,000 canaries at ``noise`` x sigma, and a fixed seed: no chance involved.

    The bound over the claim, at confidence 1 - 1e-5: below 1 at the true noise, above it at 2/3 and 1/2 of it.
    """
    rng, ledger = np.random.default_rng(7), subsampled_ledger(0.25, 1.0, 12)
    coins = rng.random(4000) < 0.5
    seen = (coins & (rng.random((12, 4000)) < 0.25)) + rng.normal(0.0, noise, (12, 4000))
    scores = np.logaddexp(math.log(0.75), math.log(0.25) + seen - 0.5).sum(0)
    claimed = PLDAccountant().epsilon(ledger, 1e-5)
    bound = epsilon_noise_scale(scores, coins, ledger=ledger, delta=1e-5, confidence=1 - 1e-5)
    assert low < bound / claimed < high
    if noise == 1.0:
        shifted = epsilon_noise_scale(scores + 100, coins, ledger=ledger, delta=1e-5, confidence=1 - 1e-5)
        assert 0.3 < shifted / claimed < 1  # all above 0: the better half is guessed


def test_the_subsampled_search_agrees_with_the_closed_form() -> None:
    """A sample rate of almost 1 is the Gaussian case: the search over scales finds what the formula says."""
    coins = np.arange(1000) % 2 == 0
    scores = np.where(np.arange(1000) % 7 == 0, -1, 1) * (coins - 0.5)
    gaussian, sampled = gaussian_ledger(1.0), subsampled_ledger(1 - 1e-9, 1.0, 1)
    exact = epsilon_noise_scale(scores, coins, ledger=gaussian, delta=1e-5)
    assert epsilon_noise_scale(scores, coins, ledger=sampled, delta=1e-5) == pytest.approx(exact, rel=5e-3)


def test_nothing_is_refuted_where_nothing_is_claimed() -> None:
    coins = np.arange(100) % 2 == 0
    for ledger in (Ledger(), scaled_ledger(Ledger(), 2.0), Ledger()):
        assert epsilon_noise_scale(coins - 0.5, coins, ledger=ledger, delta=1e-5) == 0.0
    noiseless = Ledger()
    noiseless.record(PrivacyEvent.non_private("an ablation"))
    assert epsilon_noise_scale(coins - 0.5, coins, ledger=noiseless, delta=1e-5) == 0.0
    assert epsilon_noise_scale(0.5 - coins, coins, ledger=gaussian_ledger(1.0), delta=1e-5) == 0.0


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected included to be booleans of shape"):
        epsilon_one_run([0.0, 1.0], [0, 1], delta=1e-5)
    with pytest.raises(ValueError, match="got int64 of shape"):
        epsilon_noise_scale([-1.0, 1.0], [0, 1], ledger=gaussian_ledger(1.0), delta=1e-5)
    with pytest.raises(ValueError, match=r"Expected shares in \(0, 1\]"):
        epsilon_one_run([0.0, 1.0], [True, False], delta=1e-5, shares=(0.0,))
    with pytest.raises(ValueError, match="Expected 0 <= num_correct <= num_guesses <= num_canaries"):
        one_run_p_value(10, 5, 6, 1.0, 0.0)
    with pytest.raises(TypeError, match="Expected a record of tensors and whole numbers"):
        random_records("text", 3)
    with pytest.raises(ValueError, match="Expected num_classes >= 2"):
        mislabelled([(0.0, 0)], num_classes=1)


def test_mislabelled_records_never_keep_their_label() -> None:
    records = [(position, position % 3) for position in range(60)]
    wrong = mislabelled(records, num_classes=3, seed=0)
    assert [features for features, _ in wrong] == [features for features, _ in records]
    assert all(a != b for (_, a), (_, b) in zip(records, wrong, strict=True))
    assert {label for _, label in wrong} == {0, 1, 2}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"lightning_dp.auditing.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
