"""A law of the likelihood ratio of one pass under random allocation, at least as spread as the true law.

Each sample joins exactly one of the t batches of a pass, uniformly and independently. With and without one sample, and
with x ~ N(0, sigma^2 I_t) the noise of its t batches, the likelihood ratio of the whole pass is

    S = (1 / t) sum_i exp(x_i / sigma^2 - 1 / (2 sigma^2)),     E S = 1
    with against without the sample ("remove"):  delta(epsilon) = E[max(S - e^epsilon, 0)]
    without against with the sample ("add"):     delta(epsilon) = E[max(1 - e^epsilon S, 0)]

Both are expectations of convex functions of S. The law is put on the points exp(step x k) by splitting every mass
between its two neighbours, which preserves mass and mean. The split never lowers such an expectation, also after
independent split laws are added. The error is of second order in the step. The sum of t lognormal laws is computed from
two half sums, with steps that shrink with the spread of the partial sums.

References:
    Feldman and Shenfeld (2025), "Privacy Amplification by Random Allocation": the mechanism and its dominating pair.
    Shaked and Shanthikumar (2007), "Stochastic Orders", Theorem 3.A.12: sums keep the convex order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Array = npt.NDArray[np.float64]

LEAST_NOISE = 0.05  # below, a pass is counted as one Gaussian, which differs by less than log(t) in epsilon
_REACH = 9.0  # standard deviations of the noise that a lognormal law covers on either side
_TAIL = 1e-18  # share of mass and of mean that may leave the grid at each end of a sum


@dataclass(frozen=True)
class RatioLaw:
    """A discrete law of a likelihood ratio S on the points ``exp(step * (offset + i))``, i = 0, 1, ...

    Args:
        step: Distance of successive points in log S; a power of two.
        offset: Index of the first point.
        masses: Probability of each point.
        at_zero: Probability of S = 0: infinite loss for "add".
        beyond: Part of the mean that is at infinity with probability 0: infinite loss for "remove".
    """

    step: float
    offset: int
    masses: Array
    at_zero: float
    beyond: float

    @property
    def log_points(self) -> Array:
        """Logarithms of the points."""
        return np.asarray((self.offset + np.arange(self.masses.size)) * self.step, dtype=np.float64)

    @property
    def mean(self) -> float:
        """Mean of S, including the part at infinity."""
        return float(self.masses @ np.exp(self.log_points)) + self.beyond


@lru_cache(maxsize=128)
def allocation_law(noise_multiplier: float, num_batches: int, parts: int) -> RatioLaw:
    """Return a law at least as spread, in convex order, as the law of the likelihood ratio S of one pass.

    **Guarantee**: E f(result) >= E f(S) for every convex f, up to rounding, and the mean stays 1. Finer grids lower it.

    Args:
        noise_multiplier: sigma >= `LEAST_NOISE`.
        num_batches: t >= 1.
        parts: Grid points per relative standard deviation of a partial sum; a power of two.

    Returns:
        The law, cached.
    """
    variance = math.expm1(1 / noise_multiplier**2)  # of one lognormal of mean 1
    widest = max(1.0, 1 / noise_multiplier) / (4 * parts)

    def step(num_terms: int) -> float:
        fine = min(widest, math.sqrt(variance / num_terms) / parts)
        return 2.0 ** math.floor(math.log2(fine))

    sums: dict[int, RatioLaw] = {}

    def sum_of(num_terms: int) -> RatioLaw:
        if num_terms not in sums:
            if num_terms == 1:
                sums[1] = _lognormal(noise_multiplier, num_batches, step(1))
            else:
                half = num_terms // 2  # both halves differ by one term at most, so each level has two laws
                first = _on_finer_grid(sum_of(half), step(num_terms))
                even = num_terms == 2 * half
                second = first if even else _on_finer_grid(sum_of(num_terms - half), step(num_terms))
                sums[num_terms] = _sum(first, second)
        return sums[num_terms]

    return sum_of(num_batches)


def _lognormal(noise_multiplier: float, num_batches: int, step: float) -> RatioLaw:
    """Return the law of one term of S, exp(x / sigma^2 - 1 / (2 sigma^2)) / t, split onto the grid."""
    center, scale = -math.log(num_batches) - 0.5 / noise_multiplier**2, 1 / noise_multiplier
    first = math.floor((center - _REACH * scale) / step)
    last = math.ceil((center + (_REACH + scale) * scale) / step)
    logs = np.arange(first, last + 1, dtype=np.float64) * step
    points, z = np.exp(logs), np.asarray((logs - center) / scale)
    masses, means = _cells(z), _cells(z - scale) / num_batches
    upper = np.clip((means - points[:-1] * masses) / np.diff(points), 0, masses)
    split = np.append(masses - upper, 0.0)
    split[1:] += upper
    # the ends: split mass below the grid between zero and the first point, mass above between the last and infinity
    below, mean_below = float(ndtr(z[0])), float(ndtr(z[0] - scale)) / num_batches
    above, mean_above = float(ndtr(-z[-1])), float(ndtr(scale - z[-1])) / num_batches
    split[0] += mean_below / points[0]
    split[-1] += above
    return _normalized(RatioLaw(step, first, split, below - mean_below / points[0], mean_above - above * points[-1]))


def _cells(z: Array) -> Array:
    """Return the standard normal probability between successive points, computed from the nearer tail."""
    return np.asarray(np.where(z[1:] <= 0, np.diff(ndtr(z)), -np.diff(ndtr(-z))))


def _on_finer_grid(law: RatioLaw, step: float) -> RatioLaw:
    ratio = round(law.step / step)
    if ratio == 1:
        return law
    masses = np.zeros((law.masses.size - 1) * ratio + 1)
    masses[::ratio] = law.masses
    return RatioLaw(step, law.offset * ratio, masses, law.at_zero, law.beyond)


def _sum(first: RatioLaw, second: RatioLaw) -> RatioLaw:
    """Return the law of the sum of two independent ratios on one grid, split onto that grid."""
    step = first.step
    low, high = (math.floor(np.logaddexp(first.log_points[end], second.log_points[end]) / step) for end in (0, -1))
    out, at_zero = np.zeros(high - low + 3), first.at_zero * second.at_zero
    if first is second:
        _add_pairs(out, low, first, second, least=0, most=0)
        _add_pairs(out, low, first, second, least=1, times=2.0)
    else:
        _add_pairs(out, low, first, second, least=0)
        _add_pairs(out, low, second, first, least=1)
    # zero plus a point gives the point, or is split with zero below the grid
    for one, other in ((first, second), (second, first)):
        masses, num_below = other.at_zero * one.masses, min(max(low - one.offset, 0), one.masses.size)
        start = one.offset + num_below - low
        out[start : start + masses.size - num_below] += masses[num_below:]
        kept = float(masses[:num_below] @ np.exp(one.log_points[:num_below] - low * step))
        out[0] += kept
        at_zero += float(masses[:num_below].sum()) - kept
    return _normalized(_trimmed(RatioLaw(step, low, out, at_zero, first.beyond + second.beyond)))


def _add_pairs(
    out: Array,
    offset: int,
    larger: RatioLaw,
    smaller: RatioLaw,
    *,
    least: int,
    most: int | None = None,
    times: float = 1.0,
) -> None:
    """Add to `out` the sums of all pairs of points whose indices differ by least <= d <= most.

    exp(step a) + exp(step (a - d)) = exp(step a + log(1 + exp(-step d))) is split between the points a + k and a + k +
    1 with k and the shares depending on d alone, so the pairs of one k are a short convolution.
    """
    step, growth = larger.step, math.expm1(larger.step)
    first_a, num_a, first_b, num_b = larger.offset, larger.masses.size, smaller.offset, smaller.masses.size
    least = max(least, first_a - (first_b + num_b - 1))
    most = first_a + num_a - 1 - first_b if most is None else most
    weighted = larger.masses * times
    # from here on the sum is between a and a + 1, with a share of exp(-step d) / (e^step - 1): a running sum does
    far = max(least, math.ceil(-math.log(growth) / step) + 1)
    differences = np.arange(least, min(most + 1, far))
    logs = np.log1p(np.exp(-differences * step))
    shifts = np.floor(logs / step).astype(np.intp)
    shares = np.expm1(logs - shifts * step) / growth
    bounds = np.flatnonzero(np.diff(shifts, prepend=-1, append=-1)).tolist()
    for start, stop in itertools.pairwise(bounds):
        low, high = least + start, least + stop - 1
        begin, end = max(first_a, first_b + low), min(first_a + num_a, first_b + num_b + high)
        if begin >= end:
            continue
        origin = max(begin - high, first_b)  # mass of `smaller` at these distances
        part = smaller.masses[origin - first_b : end - low - first_b]
        masses = weighted[begin - first_a : end - first_a]
        skipped, share = begin - origin - low, shares[start:stop]
        at = begin + int(shifts[start]) - offset
        for place, weights in ((at, 1 - share), (at + 1, share)):
            out[place : place + masses.size] += masses * np.convolve(part, weights)[skipped : skipped + masses.size]
    begin = max(first_a, first_b + far)
    if most >= far and begin < first_a + num_a:
        masses = weighted[begin - first_a :]
        upto = np.minimum(np.arange(begin, first_a + num_a) - far - first_b, num_b - 1)
        mass = np.cumsum(smaller.masses)[upto]
        mean = np.cumsum(smaller.masses * np.exp(smaller.log_points))[upto]
        upper = masses * mean * np.exp(-larger.log_points[begin - first_a :]) / growth
        at = begin - offset
        out[at : at + masses.size] += masses * mass - upper
        out[at + 1 : at + 1 + masses.size] += upper


def _trimmed(law: RatioLaw) -> RatioLaw:
    """Return a law without its negligible ends; their mass is split with zero below and infinity above."""
    points = np.exp(law.log_points)
    means = law.masses * points
    low = int(np.searchsorted(np.cumsum(law.masses), _TAIL))
    high = points.size - 1 - int(np.searchsorted(np.cumsum(means[::-1]), _TAIL * law.mean))
    masses = law.masses[low : high + 1].copy()
    below, mean_below = law.masses[:low].sum(), means[:low].sum() / points[low]
    above, mean_above = law.masses[high + 1 :].sum(), means[high + 1 :].sum()
    masses[0] += mean_below
    masses[-1] += above
    at_zero, beyond = law.at_zero + below - mean_below, law.beyond + mean_above - above * points[high]
    return RatioLaw(law.step, law.offset + low, masses, float(at_zero), float(beyond))


def _normalized(law: RatioLaw) -> RatioLaw:
    """Return the law scaled to mass 1, because a t-fold sum would multiply its rounding error."""
    masses = law.masses * ((1 - law.at_zero) / law.masses.sum())
    return RatioLaw(law.step, law.offset, masses, law.at_zero, law.beyond)
