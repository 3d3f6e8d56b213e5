"""Slow, obviously right privacy losses of one and two releases, by numerical integration of the two densities."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm


class Pair:
    """Densities P and Q of one release along the difference of two neighbouring data sets, on a dense line."""

    def __init__(self, sample_rate, noise_multiplier, direction, num_points=200_001):
        self.q, self.sigma, self.direction = sample_rate, noise_multiplier, direction
        self.x = np.linspace(-14 * noise_multiplier - 1, 14 * noise_multiplier + 1, num_points)
        self.p, self.r = self.densities(self.x)

    def mixture(self, x, center):
        return (1 - self.q) * norm.pdf(x, 0, self.sigma) + self.q * norm.pdf(x, center, self.sigma)

    def densities(self, x):
        if self.direction == "remove":
            return self.mixture(x, 1.0), norm.pdf(x, 0, self.sigma)
        if self.direction == "add":
            return norm.pdf(x, 0, self.sigma), self.mixture(x, 1.0)
        return self.mixture(x, 0.5), self.mixture(x, -0.5)

    def delta(self, epsilon):
        """Hockey-stick divergence of one release."""
        return np.trapezoid(np.maximum(self.p - math.exp(epsilon) * self.r, 0), self.x)

    def delta_then(self, other, epsilon):
        """Hockey-stick divergence of this release followed by `other`: E_P[divergence of other at epsilon - loss]."""
        coarse = slice(None, None, 50)  # smooth in x, unlike the inner integrand
        x, p, r = self.x[coarse], self.p[coarse], self.r[coarse]
        keep = (p > 1e-30) & (r > 0)
        losses = np.log(p[keep] / r[keep])
        inner = np.array([other.delta(epsilon - loss) for loss in losses])
        return np.trapezoid(p[keep] * inner, x[keep])


def directions(relation):
    return ("replace",) if relation == "replace_one" else ("remove", "add")


def one_step_epsilon(sample_rate, noise_multiplier, delta, relation="add_or_remove_one"):
    """Epsilon of one Poisson-sampled Gaussian."""
    pairs = [Pair(sample_rate, noise_multiplier, direction) for direction in directions(relation)]
    return max(_root(pair.delta, delta) for pair in pairs)


def two_step_epsilon(first, second, delta, relation="add_or_remove_one"):
    """Epsilon of two Poisson-sampled Gaussians, each (sample rate, noise multiplier)."""
    epsilons = []
    for direction in directions(relation):
        pair, other = Pair(*first, direction, 10_001), Pair(*second, direction, 10_001)  # type: ignore[call-arg]
        epsilons.append(_root(lambda e, pair=pair, other=other: pair.delta_then(other, e), delta, xtol=1e-5))
    return max(epsilons)


def _root(function, delta, xtol=1e-9):
    if function(0.0) <= delta:
        return 0.0
    return brentq(lambda e: function(e) - delta, 0.0, 50.0, xtol=xtol)
