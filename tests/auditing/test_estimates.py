"""Bounds from two worlds: known values, exact error probabilities, and the corners of the ROC curve."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import binom, norm

from lightning_dp.accounting import gaussian_epsilon
from lightning_dp.auditing import epsilon_clopper_pearson, epsilon_gdp
from lightning_dp.auditing.estimates import clopper_pearson_upper, error_rates, operating_points


def test_separated_scores_give_the_published_value() -> None:
    """500 against 500, alpha .01: tensorflow_privacy's tests print 4.541915810224092, of which rounding has the last
    two digits.
    """
    found = epsilon_clopper_pearson([1.0] * 500, [0.0] * 500, threshold=0.5, confidence=0.99)
    assert found == pytest.approx(4.541915810224092, abs=2e-14)
    rate = 0.005 ** (1 / 500)  # the closed form where nothing goes wrong
    assert found == pytest.approx(math.log(rate) - math.log(-math.expm1(math.log(rate))), rel=1e-15)
    assert epsilon_clopper_pearson([1.0] * 500, [1.0] * 500, threshold=0.5, confidence=0.99) == 0.0


@pytest.mark.parametrize("total", [10, 200])
@pytest.mark.parametrize("significance", [0.05, 0.005])
def test_the_upper_end_is_where_so_few_events_become_unlikely(total: int, significance: float) -> None:
    for count in (0, 1, total // 2, total - 1):
        upper = clopper_pearson_upper(count, total, significance)
        assert binom.cdf(count, total, upper) == pytest.approx(significance, rel=1e-9)
    assert clopper_pearson_upper(total, total, significance) == 1.0


@pytest.mark.parametrize(("leak", "too_sure"), [(1.0, False), (2.0, False), (1.0, True)])
def test_the_bound_is_wrong_no_more_often_than_it_says(leak: float, too_sure: bool) -> None:
    """Exact, by summing over all outcomes: randomised response at epsilon ``leak``, 30 runs a world, confidence .8.

    The same sum for a bound that claims .8 but is made at .2 exceeds .2, so the test can tell.
    """
    wrong, runs = 1 / (1 + math.exp(leak)), 30
    confidence = 0.2 if too_sure else 0.8
    exceeds = 0.0
    for false_positives, false_negatives in itertools.product(range(runs + 1), repeat=2):
        inside = [0.0] * false_negatives + [1.0] * (runs - false_negatives)
        outside = [1.0] * false_positives + [0.0] * (runs - false_positives)
        mass = binom.pmf(false_positives, runs, wrong) * binom.pmf(false_negatives, runs, wrong)
        if mass > 1e-7 and epsilon_clopper_pearson(inside, outside, threshold=0.5, confidence=confidence) > leak:
            exceeds += mass
    assert (exceeds <= 0.2) == (not too_sure)


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_the_gaussian_bound_is_tight_and_below(mu: float) -> None:
    """Scores at the quantiles of N(0, 1) and N(mu, 1): no chance involved. A scale of 2/3 or 3/2 is outside."""
    quantiles = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    bound = epsilon_gdp(quantiles + mu, quantiles, threshold=mu / 2, delta=1e-5, confidence=0.95)
    assert 0.91 * gaussian_epsilon(mu, 1e-5) < bound < gaussian_epsilon(mu, 1e-5)
    assert bound > gaussian_epsilon(2 / 3 * mu, 1e-5)


def test_delta_lowers_the_bound() -> None:
    scores = [1.0] * 50, [0.0] * 50
    bounds = [epsilon_clopper_pearson(*scores, threshold=0.5, delta=delta) for delta in (0.0, 0.1, 0.5, 0.99)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == 0.0
    rates = error_rates(*scores, threshold=0.5)
    assert bounds[1] == pytest.approx(math.log((0.9 - rates.false_negative) / rates.false_positive))


def test_operating_points_are_the_corners_of_the_concave_hull() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1.0, 1.0, 40), rng.normal(0.0, 1.0, 30)
    points = operating_points(inside, outside)
    thresholds = [math.inf, *sorted({*inside, *outside}, reverse=True)]
    every = [(int((inside >= t).sum()), int((outside >= t).sum())) for t in thresholds]
    assert (points[0], points[-1]) == ((0, 0), (40, 30))
    assert set(points) <= set(every)
    for (low_tp, low_fp), (high_tp, high_fp) in itertools.pairwise(points):
        for tp, fp in every:  # none is above any edge
            assert (tp - low_tp) * (high_fp - low_fp) <= (high_tp - low_tp) * (fp - low_fp)
    slopes = [(b[0] - a[0]) / max(b[1] - a[1], 1e-9) for a, b in itertools.pairwise(points)]
    assert all(first > second for first, second in itertools.pairwise(slopes))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"in_scores": []}, "Expected in_scores to be a non-empty vector"),
        ({"out_scores": [float("nan")]}, "Expected out_scores to be a non-empty vector"),
        ({"delta": 1.0}, "Expected 0 <= delta < 1"),
        ({"delta": float("nan")}, "Expected 0 <= delta < 1"),
        ({"confidence": 1.0}, "Expected 0 < confidence < 1"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, object], match: str) -> None:
    arguments = {"in_scores": [1.0], "out_scores": [0.0], "threshold": 0.5, "delta": 0.0, "confidence": 0.9}
    with pytest.raises(ValueError, match=match):
        epsilon_clopper_pearson(**{**arguments, **change})
    with pytest.raises(ValueError, match="Expected 0 <= count <= total"):
        clopper_pearson_upper(3, 2, 0.05)


def test_a_gaussian_test_at_its_midpoint_errs_as_the_theory_says() -> None:
    """The inverse of the formula in ``epsilon_gdp``: both rates Phi(-mu / 2) give mu back."""
    quantiles = norm.ppf((np.arange(1_000) + 0.5) / 1_000)
    rates = error_rates(quantiles + 2.0, quantiles, threshold=1.0, confidence=0.5)
    assert rates.false_positive == pytest.approx(ndtr(-1.0), abs=0.012)
    assert rates.false_negative == pytest.approx(ndtr(-1.0), abs=0.012)
