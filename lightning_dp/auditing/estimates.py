"""Lower bounds on epsilon from the scores of models trained with a canary and without it.

Every sample here must be an independent training run, or an independent canary. ``one_run`` needs no independence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from scipy.stats import beta

from lightning_dp import _validate as check
from lightning_dp.accounting import gaussian_epsilon

Scores = NDArray[np.float64]


def check_scores(name: str, scores: ArrayLike) -> Scores:
    """Return scores as a float64 vector; refuse other shapes, an empty vector and NaN."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or bool(np.isnan(values).any()):
        raise ValueError(
            f"Expected {name} to be a non-empty vector without NaN, got {name} of shape {values.shape}. Pass one score "
            "for each canary."
        )
    return values


def check_coins(included: ArrayLike, scores: Scores) -> NDArray[np.bool_]:
    """Return coins as a vector of booleans; refuse other types and another length than that of the scores."""
    coins = np.asarray(included)
    if coins.dtype != np.bool_ or coins.shape != scores.shape:
        raise ValueError(
            f"Expected included to be booleans of shape {scores.shape}, got {coins.dtype} of shape {coins.shape}. Pass "
            "one coin for each score."
        )
    return coins


def check_delta(delta: Any) -> float:
    """Return delta as a float; refuse values outside [0, 1)."""
    if not 0 <= check.check_number("delta", delta) < 1:
        raise ValueError(f"Expected 0 <= delta < 1, got delta={delta}. Pass the delta that epsilon is claimed at.")
    return float(delta)


def clopper_pearson_upper(count: int, total: int, significance: float) -> float:
    """Return the upper end of the one-sided Clopper-Pearson interval of a rate.

    P[Bin(total, p) <= count] = significance, solved for p

    **Guarantee**: the result is below the true rate with probability at most ``significance``, for every rate.

    Args:
        count: events seen, in [0, total].
        total: independent trials, >= 1.
        significance: in (0, 1).

    Returns:
        A rate in (0, 1].

    Example:
        >>> round(clopper_pearson_upper(0, 500, 0.005), 6)
        0.010541

    References:
        Clopper and Pearson 1934, The use of confidence or fiducial limits.
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"Expected 0 <= count <= total, got count={count}, total={total}. Count events among trials.")
    return 1.0 if count == total else float(beta.isf(significance, count + 1, total - count))


@dataclass(frozen=True)
class ErrorRates:
    """Upper confidence bounds, valid together, on both error rates of the test "was the canary in?".

    Args:
        false_positive: bound on P[says in | out].
        false_negative: bound on P[says out | in].
    """

    false_positive: float
    false_negative: float


def error_rates(
    in_scores: ArrayLike, out_scores: ArrayLike, *, threshold: float, confidence: float = 0.95
) -> ErrorRates:
    """Return upper confidence bounds on the error rates of the test that says "in" above a threshold.

    Args:
        in_scores: scores with the canary, shape (n,).
        out_scores: scores without, shape (k,).
        threshold: chosen without looking at these scores.
        confidence: of both bounds together, in (0, 1).

    Raises:
        ValueError: no scores, NaN among them, or a confidence out of range.

    Example:
        >>> error_rates([1.0] * 500, [0.0] * 500, threshold=0.5, confidence=0.99).false_positive < 0.011
        True
    """
    inside, outside = check_scores("in_scores", in_scores), check_scores("out_scores", out_scores)
    half = (1 - check.check_probability("confidence", confidence)) / 2
    return ErrorRates(
        false_positive=clopper_pearson_upper(int((outside > threshold).sum()), outside.size, half),
        false_negative=clopper_pearson_upper(int((inside <= threshold).sum()), inside.size, half),
    )


def epsilon_clopper_pearson(
    in_scores: ArrayLike, out_scores: ArrayLike, *, threshold: float, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """Return a lower confidence bound on epsilon from one threshold, for any mechanism.

        epsilon >= ln((1 - delta - FNR) / FPR)    and    epsilon >= ln((1 - delta - FPR) / FNR)

    with Clopper-Pearson upper bounds for both rates, each at half of 1 - confidence.

    **Guarantee**: the bound exceeds the true epsilon at ``delta`` with probability at most ``1 - confidence``, if the
    scores are independent and the threshold does not depend on them. Even for the worst leak it is at most about
    ln(n / 3.7), for n scores of each kind and the default confidence.

    Args:
        in_scores: scores with the canary, shape (n,).
        out_scores: scores without, shape (k,).
        threshold: chosen without looking at these scores.
        delta: in [0, 1).
        confidence: in (0, 1).

    Returns:
        A bound in [0, inf).

    Raises:
        ValueError: numbers out of range, no scores, or NaN among them.

    Example:
        >>> round(epsilon_clopper_pearson([1.0] * 500, [0.0] * 500, threshold=0.5, confidence=0.99), 12)
        4.541915810224

    References:
        Jagielski, Ullman and Oprea 2020, Auditing Differentially Private Machine Learning, section 4.
        Nasr et al. 2021, Adversary Instantiation, section IV.
    """
    delta = check_delta(delta)
    rates = error_rates(in_scores, out_scores, threshold=threshold, confidence=confidence)
    bounds = [0.0]
    for wrong, other in (
        (rates.false_positive, rates.false_negative),
        (rates.false_negative, rates.false_positive),
    ):
        if 1 - delta - other > 0:
            bounds.append(math.log((1 - delta - other) / wrong))
    return max(bounds)


def epsilon_gdp(
    in_scores: ArrayLike, out_scores: ArrayLike, *, threshold: float, delta: float, confidence: float = 0.95
) -> float:
    """Return a lower confidence bound on the epsilon of a Gaussian mechanism, from one threshold.

        mu >= Phi^-1(1 - FPR) - Phi^-1(FNR),     epsilon = epsilon of a mu-GDP mechanism at delta

    with Clopper-Pearson upper bounds for both rates, each at half of 1 - confidence.

    **Guarantee**: as ``epsilon_clopper_pearson``, and tighter, but ONLY for mechanisms with the trade-off function of a
    Gaussian: compositions of Gaussians without subsampling. One point then determines the whole function; for
    subsampled Gaussians the value may exceed the true epsilon.

    Args:
        in_scores: scores with the canary, shape (n,).
        out_scores: scores without, shape (k,).
        threshold: chosen without looking at these scores.
        delta: in (0, 1).
        confidence: in (0, 1).

    Returns:
        A bound in [0, inf).

    Raises:
        ValueError: numbers out of range, no scores, or NaN among them.

    Example:
        >>> round(epsilon_gdp([1.0] * 500, [0.0] * 500, threshold=0.5, delta=1e-5, confidence=0.99), 3)
        29.609

    References:
        Nasr et al. 2023, Tight Auditing of Differentially Private Machine Learning, section 4.
        Dong, Roth and Su 2022, Gaussian Differential Privacy, section 2.
    """
    rates = error_rates(in_scores, out_scores, threshold=threshold, confidence=confidence)
    mu = float(-ndtri(rates.false_positive) - ndtri(rates.false_negative))
    return gaussian_epsilon(mu, delta) if mu > 0 else 0.0


def operating_points(in_scores: ArrayLike, out_scores: ArrayLike) -> Sequence[tuple[int, int]]:
    """Return (true positives, false positives) at the corners of the ROC curve's concave hull.

    Args:
        in_scores: scores with the canary, shape (n,).
        out_scores: scores without, shape (k,).

    Returns:
        Points from (0, 0) to (n, k). They depend on the scores, so divide the significance by their number.

    Example:
        >>> operating_points([0.0, 2.0, 3.0], [0.0, 1.0])
        [(0, 0), (2, 0), (3, 2)]
    """
    inside, outside = (np.sort(check_scores("scores", scores)) for scores in (in_scores, out_scores))
    thresholds = np.append(np.union1d(inside, outside), np.inf)[::-1]
    true_positives = (inside.size - np.searchsorted(inside, thresholds)).tolist()
    false_positives = (outside.size - np.searchsorted(outside, thresholds)).tolist()
    hull: list[tuple[int, int]] = []
    for point in zip(true_positives, false_positives, strict=True):
        while len(hull) >= 2 and _turns_left(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_left(first: tuple[int, int], middle: tuple[int, int], last: tuple[int, int]) -> bool:
    """Return whether the middle point is on or below the line through the other two (true positives upwards)."""
    rise, run = middle[0] - first[0], middle[1] - first[1]
    next_rise, next_run = last[0] - middle[0], last[1] - middle[1]
    return next_rise * run >= rise * next_run
