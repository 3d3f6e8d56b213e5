"""Lower bounds on epsilon from ONE training run with many canaries, each included by its own fair coin.

Legend: ``m`` canaries, ``r`` guesses, ``v`` right guesses. There need not be a guess for every canary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri
from scipy.stats import binom

from lightning_dp import _validate as check
from lightning_dp.accounting import gaussian_epsilon
from lightning_dp.auditing.estimates import check_coins, check_delta, check_scores, operating_points

SHARES = (1.0, 0.5, 0.25, 0.1)
"""Shares of the canaries for which to guess, by default."""
_TOLERANCE = 1e-9
_LARGEST = 1e3


def one_run_p_value(num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float) -> float:
    """Return an upper bound on the probability of at least v right guesses under (epsilon, delta)-DP.

        beta = P[B >= v],   B ~ Bin(r, e^epsilon / (1 + e^epsilon))
        p = beta + 2 m delta max_{i = 1..v} (P[B >= v - i] - beta) / i

    **Guarantee**: P[at least v right guesses] <= p for every (epsilon, delta)-private algorithm and every rule that
    guesses from its output, if a fair coin includes each canary. The canaries' effects need not be independent.

    Args:
        num_canaries: m.
        num_guesses: r, in [1, m].
        num_correct: v, in [0, r].
        epsilon: >= 0.
        delta: in [0, 1).

    Returns:
        p, in [0, 1].

    Example:
        >>> one_run_p_value(100, 100, 100, 0.0, 0.0) == 0.5**100
        True

    References:
        Steinke, Nasr and Jagielski 2023, Privacy Auditing with One (1) Training Run, section 5.
    """
    if not 0 <= num_correct <= num_guesses <= num_canaries or num_guesses < 1:
        raise ValueError(
            f"Expected 0 <= num_correct <= num_guesses <= num_canaries, got {num_correct}, {num_guesses}, "
            f"{num_canaries}. Count right guesses among guesses."
        )
    rate = float(expit(epsilon))
    exact = float(binom.sf(num_correct - 1, num_guesses, rate))
    if delta == 0 or num_correct == 0:
        return exact
    fewer = np.arange(1, num_correct + 1)
    slopes = (binom.sf(num_correct - fewer - 1, num_guesses, rate) - exact) / fewer
    return min(1.0, exact + 2 * num_canaries * delta * max(0.0, float(slopes.max())))


def one_run_gdp_gap(num_canaries: int, num_guesses: int, num_correct: int, mu: float, significance: float) -> float:
    """Return the smallest share of guesses that mu-GDP allows, minus r / m; above 0 refutes mu at ``significance``.

    The recursion of the reference goes from v right guesses downwards and bounds the probability of at least so many.
    It ends with the smallest share of guesses for which v right guesses have probability ``significance``.

    Args:
        num_canaries: m.
        num_guesses: r, in [1, m].
        num_correct: v, in [0, r].
        mu: >= 0.
        significance: in (0, 1).

    References:
        Mahloujifar, Melis and Chaudhuri 2024, Auditing f-Differential Privacy in One Run, section 3.
    """
    right = significance * num_correct / num_canaries
    wrong = significance * (num_guesses - num_correct) / num_canaries
    for i in range(num_correct - 1, -1, -1):
        larger = max(wrong, float(ndtr(ndtri(right) - mu)))
        if larger == wrong:
            break
        right = min(1.0, right + i / (num_guesses - i) * (larger - wrong))
        wrong = larger
    return right + wrong - num_guesses / num_canaries


def epsilon_of_counts(
    num_canaries: int, num_guesses: int, num_correct: int, *, delta: float, significance: float, at_least: float = 0.0
) -> float:
    """Return the largest epsilon that the counts refute: ``one_run_p_value <= significance``.

    Args:
        num_canaries: m.
        num_guesses: r.
        num_correct: v.
        delta: in [0, 1).
        significance: in (0, 1).
        at_least: smallest result; returned without a search if the bound is below it.

    Example:
        >>> round(epsilon_of_counts(1000, 1000, 900, delta=1e-5, significance=0.05), 3)
        2.021
    """
    return _largest_refuted(
        lambda epsilon: significance - one_run_p_value(num_canaries, num_guesses, num_correct, epsilon, delta), at_least
    )


def mu_of_counts(num_canaries: int, num_guesses: int, num_correct: int, *, significance: float) -> float:
    """Return the largest mu that the counts refute: ``one_run_gdp_gap >= 0``.

    Args:
        num_canaries: m.
        num_guesses: r.
        num_correct: v.
        significance: in (0, 1).

    Example:
        >>> round(mu_of_counts(1000, 1000, 900, significance=0.05), 3)
        0.88
    """
    return _largest_refuted(lambda mu: one_run_gdp_gap(num_canaries, num_guesses, num_correct, mu, significance), 0.0)


def epsilon_one_run(
    scores: ArrayLike,
    included: ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    shares: Sequence[float] = SHARES,
) -> float:
    """Return a lower confidence bound on epsilon from one run, for any mechanism.

    For each of K shares s, the s m / 2 highest scores are guessed "in" and the s m / 2 lowest "out". The best of the K
    bounds counts, each at (1 - confidence) / K.

    **Guarantee**: the bound exceeds the true epsilon at ``delta`` with probability at most ``1 - confidence``, if each
    canary was included by a fair coin of its own. The rule never uses the coins, so nothing else is assumed.

    Args:
        scores: shape (m,); a high score means "in".
        included: shape (m,), True where the coin said "in".
        delta: in [0, 1); far below 1 / m, or the bound is 0.
        confidence: in (0, 1).
        shares: each in (0, 1], fixed ahead of the run.

    Returns:
        A bound in [0, inf).

    Raises:
        ValueError: numbers or shapes out of range.

    Example:
        >>> coins = np.arange(1000) % 2 == 0
        >>> round(epsilon_one_run(coins * 1.0, coins, delta=1e-6), 2)
        5.42

    References:
        Steinke, Nasr and Jagielski 2023, Privacy Auditing with One (1) Training Run, sections 3 and 5.
    """
    counts, total, significance = _guesses(scores, included, confidence, shares)
    delta, best = check_delta(delta), 0.0
    for guesses, correct in counts:
        best = epsilon_of_counts(total, guesses, correct, delta=delta, significance=significance, at_least=best)
    return best


def epsilon_one_run_gdp(
    scores: ArrayLike,
    included: ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    shares: Sequence[float] = SHARES,
) -> float:
    """Return a lower confidence bound on the epsilon of a Gaussian mechanism, from one run.

    Guesses follow the rule of ``epsilon_one_run``; the largest mu that they refute gives epsilon at ``delta``.

    **Guarantee**: as ``epsilon_one_run``, but ONLY for mechanisms that are exactly mu-GDP for some mu: compositions of
    Gaussians without subsampling.

    Args:
        scores: shape (m,); a high score means "in".
        included: shape (m,), True where the coin said "in".
        delta: in (0, 1).
        confidence: in (0, 1).
        shares: each in (0, 1], fixed ahead of the run.

    Returns:
        A bound in [0, inf).

    Raises:
        ValueError: numbers or shapes out of range.

    References:
        Mahloujifar, Melis and Chaudhuri 2024, Auditing f-Differential Privacy in One Run.
        Nasr et al. 2023, Tight Auditing of Differentially Private Machine Learning, section 4 (from mu to epsilon).
    """
    counts, total, significance = _guesses(scores, included, confidence, shares)
    mu = max(mu_of_counts(total, guesses, correct, significance=significance) for guesses, correct in counts)
    return gaussian_epsilon(mu, check.check_probability("delta", delta))


def epsilon_one_run_all_thresholds(
    in_scores: ArrayLike, out_scores: ArrayLike, *, delta: float, confidence: float = 0.95
) -> float:
    """Return the best one-run bound over thresholds; scores from a threshold on are guessed "in", others not at all.

    Thresholds are the K corners of the ROC curve's concave hull, each tried at (1 - confidence) / K.

    **Guarantee**: as for ``epsilon_one_run`` at each threshold. But K and the corners depend on the coins, so over all
    thresholds the confidence is only nominal. If it must hold, use ``epsilon_one_run``.

    Args:
        in_scores: scores of canaries that were in.
        out_scores: scores of canaries that were out.
        delta: in [0, 1).
        confidence: in (0, 1).

    References:
        Steinke, Nasr and Jagielski 2023, Privacy Auditing with One (1) Training Run, section 5.
    """
    points = operating_points(in_scores, out_scores)
    total = sum(points[-1])
    significance = (1 - check.check_probability("confidence", confidence)) / len(points)
    delta, best = check_delta(delta), 0.0
    precise_first = sorted(points[1:], key=lambda point: -point[0] / sum(point))
    for correct, wrong in precise_first:
        if correct / (correct + wrong) <= expit(best):
            break  # no bound exceeds the one from the share of right guesses
        best = epsilon_of_counts(total, correct + wrong, correct, delta=delta, significance=significance, at_least=best)
    return best


def _guesses(
    scores: ArrayLike, included: ArrayLike, confidence: float, shares: Sequence[float]
) -> tuple[list[tuple[int, int]], int, float]:
    """Return the numbers of guesses and of right guesses per share, the number of canaries, and the significance."""
    values = check_scores("scores", scores)
    coins = check_coins(included, values)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(
            f"Expected shares in (0, 1], got shares={shares!r}. Pass which part of the canaries to guess on."
        )
    order = np.argsort(values, kind="stable")
    counts = []
    for share in shares:
        half = max(1, round(share * values.size / 2)) if values.size > 1 else 1
        low, high = order[: values.size - half][:half], order[-half:]
        counts.append((low.size + high.size, int((~coins[low]).sum() + coins[high].sum())))
    return counts, values.size, (1 - check.check_probability("confidence", confidence)) / len(shares)


def _largest_refuted(gap: Callable[[Any], float], at_least: float) -> float:
    """Return the root of the falling function ``gap``, rounded down, or ``at_least`` if the root is below it."""
    if not gap(at_least) > 0:
        return at_least
    low, high = at_least, max(1.0, 2 * at_least)
    while gap(high) > 0:
        if high >= _LARGEST:
            return high
        low, high = high, 2 * high
    root = float(brentq(gap, low, high, xtol=_TOLERANCE))
    return max(at_least, root - 2 * _TOLERANCE)
