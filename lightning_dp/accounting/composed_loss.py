"""The composed privacy loss on a grid; it gives epsilon, delta, and bounds on the success of any attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.signal import lfilter

from lightning_dp.accounting.allocation import Array


@dataclass(frozen=True)
class ComposedLoss:
    """Probability masses of a privacy loss at the points ``interval * (offset + i)`` and at infinity.

    delta(epsilon) = infinite + sum over losses l > epsilon of P[L = l] (1 - exp(epsilon - l))

    Args:
        masses: P[L = l] >= 0 on successive points.
        offset: Index of the first point; any integer.
        interval: Distance of two points, > 0.
        infinite: P[L = inf], including the bounds on cut-off tails and on rounding.
    """

    masses: Array
    offset: int
    interval: float
    infinite: float

    @cached_property
    def _damped(self) -> Array:
        """Sums of p_j exp(l_i - l_j) over j >= i, for every i."""
        return np.asarray(lfilter([1.0], [1.0, -math.exp(-self.interval)], self.masses[::-1])[::-1])

    @cached_property
    def divergences(self) -> Array:
        """Delta at the epsilon of each grid point; delta is linear in exp(epsilon) between points."""
        found = np.zeros(self.masses.size)
        np.cumsum(-math.expm1(-self.interval) * self._damped[:0:-1], out=found[-2::-1])
        found += self.infinite
        return found

    def epsilon(self, delta: float) -> float:
        """Return the least epsilon >= 0 whose hockey-stick divergence is at most delta; inf if there is none."""
        if self.infinite >= delta:
            return math.inf
        start = max(0, -self.offset)  # losses below 0 never count
        if start >= self.masses.size:
            return 0.0
        if start:
            return ComposedLoss(self.masses[start:], 0, self.interval, self.infinite).epsilon(delta)
        # first point at which delta is reached
        index = self.masses.size - int(np.searchsorted(self.divergences[::-1], delta, side="right"))
        excess = self.infinite + float(self.masses[index:].sum()) - delta
        if excess <= 0:  # delta exceeds the mass from there on
            return 0.0
        at = (self.offset + index) * self.interval
        epsilon = at + math.log(excess / self._damped[index])
        return float(min(max(epsilon, 0.0), at))

    def advantage(self) -> float:
        """Return an upper bound on the total variation: delta at epsilon 0."""
        losses = (self.offset + np.arange(self.masses.size)) * self.interval
        above = losses > 0
        return min(1.0, self.infinite + float(-np.expm1(-losses[above]) @ self.masses[above]))

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Return an upper bound on the true positive rate of any test at a given false positive rate.

        min over epsilon of exp(epsilon) x false_positive_rate + delta(epsilon), attained at a point of the grid
        """
        if false_positive_rate == 0:
            return min(1.0, float(self.divergences[-1]))
        with np.errstate(over="ignore"):
            odds = np.exp((self.offset + np.arange(self.masses.size)) * self.interval)
        return min(1.0, float(np.min(odds * false_positive_rate + self.divergences)))
