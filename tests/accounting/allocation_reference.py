"""Random allocation without grids of ours: exact integrals, random draws, and a law that is certainly less spread."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import norm

from lightning_dp.accounting import Ledger, PLDAccountant, PrivacyEvent, make_accountant

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


def delta_of_two_batches(sigma, direction, epsilon, num_points=400_001):
    """Hockey-stick divergence of a pass of two batches: S > c is x_2 > y(x_1), and the inner integral is closed."""
    x = np.linspace(-12, 12 + 2 / sigma, num_points)  # in standard deviations
    density = norm.pdf(x)
    ratio = np.exp(x / sigma - 0.5 / sigma**2) / 2
    cut = math.exp(epsilon if direction == "remove" else -epsilon)
    with np.errstate(divide="ignore"):
        edge = sigma * (np.log(np.maximum(2 * (cut - ratio), 0)) + 0.5 / sigma**2)
    above, mean_above = ndtr(-edge), ndtr(1 / sigma - edge) / 2  # of x_2 beyond the edge, and E[second ratio there]
    if direction == "remove":
        return float(np.trapezoid(density * (ratio * above + mean_above - cut * above), x))
    below, mean_below = 1 - above, 0.5 - mean_above
    inner = below - (ratio * below + mean_below) / cut
    return float(np.trapezoid(density * inner, x))


def sampled_ratios(sigma, num_batches, passes, num_samples, rng):
    """Likelihood ratios of several passes, drawn without the sample."""
    ratios = np.ones(num_samples)
    for _ in range(passes):
        x = rng.normal(0, sigma, (num_samples, num_batches))
        ratios *= np.exp(x / sigma**2 - 0.5 / sigma**2).mean(axis=1)
    return ratios


def sampled_delta(ratios, direction, epsilon):
    """Mean and standard error of the divergence over drawn ratios."""
    if direction == "remove":
        values = np.maximum(ratios - math.exp(epsilon), 0)
    else:
        values = np.maximum(1 - math.exp(epsilon) * ratios, 0)
    return values.mean(), values.std() / math.sqrt(values.size)


class LowerLaw:
    """A law of S that is less spread than the truth: every cell of a coarse partition is one point, at its mean."""

    def __init__(self, sigma, num_batches, num_cells):
        self.num_cells = num_cells
        edges = np.linspace(-11, 11 + 1 / sigma, num_cells + 1)
        self.terms = {1: self._single(edges, sigma, num_batches)}
        self.masses, self.points = self._sum_of(num_batches)

    def _single(self, edges, sigma, num_batches):
        def cells(z):
            return np.where(z[1:] <= 0, np.diff(ndtr(z)), -np.diff(ndtr(-z)))

        masses, means = cells(edges), cells(edges - 1 / sigma) / num_batches
        keep = (masses > 1e-25) & (means > 1e-25)  # leaving mass out only makes less of it
        return masses[keep], means[keep] / masses[keep]

    def _sum_of(self, num_terms):
        if num_terms not in self.terms:
            (p, x), (q, y) = self._sum_of(num_terms // 2), self._sum_of(num_terms - num_terms // 2)
            masses, points = np.multiply.outer(p, q).ravel(), np.add.outer(x, y).ravel()
            logs = np.log(points)
            span = (logs.max() - logs.min()) * (1 + 1e-12)
            cell = np.floor((logs - logs.min()) / span * self.num_cells).astype(int)
            mass, mean = np.bincount(cell, masses), np.bincount(cell, masses * points)
            keep = (mass > 1e-25) & (mean > 1e-25)
            self.terms[num_terms] = mass[keep], mean[keep] / mass[keep]
        return self.terms[num_terms]

    def delta(self, direction, epsilon):
        if direction == "remove":
            return float(self.masses @ np.maximum(self.points - math.exp(epsilon), 0))
        return float(self.masses @ np.maximum(1 - math.exp(epsilon) * self.points, 0))

    def epsilon(self, direction, delta):
        if self.delta(direction, 0.0) <= delta:
            return 0.0
        return brentq(lambda e: self.delta(direction, e) - delta, 0.0, 600.0, xtol=1e-12)
