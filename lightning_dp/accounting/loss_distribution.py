"""An upper bound on the privacy loss of one release, on a grid.

One coordinate along the difference of two neighbouring data sets is enough. In units of the noise's standard
deviation (z = x / sigma, d = 1 / sigma) a release is one of two densities P and Q, and its loss is L = log(P / Q):

    add_or_remove_one, zero_out   P = (1 - q) phi(z) + q phi(z - d)      Q = phi(z), and both swapped
    replace_one                   P = (1 - q) phi(z) + q phi(z - d / 2)  Q = (1 - q) phi(z) + q phi(z + d / 2)

A pass under random allocation is one release as well, whose likelihood ratio `allocation_law` bounds.

The mass of P at a loss between two grid points is split between both points so that the mass of Q is preserved too.
The resulting pair dominates the true pair, and so does every composition of such pairs.

References:
    Doroshenko, Ghazi, Kamath, Kumar and Manurangsi (2022), "Connect the Dots", Section 4: the split.
    Zhu, Dong and Wang (2022), "Optimal Accounting of Differential Privacy via Characteristic Function", Section 4.
    Lebeda, Regehr, Kamath and Steinke (2024), "Avoiding Pitfalls for Privacy Accounting of Subsampled Mechanisms under
    Composition": the pair of "replace_one".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from scipy.special import logsumexp, ndtr

from lightning_dp.accounting.allocation import Array, allocation_law
from lightning_dp.accounting.events import Mechanism

Direction = Literal["remove", "add", "replace"]

_REACH = 10.4  # standard deviations kept on either side of each component
TAIL_MASS = 4 * float(ndtr(-_REACH))  # bound on the mass cut off, which counts as infinite loss
_CELL = 1 / 32  # widest quadrature cell, in standard deviations
_MAX_EDGES = 1 << 20
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(2)


@dataclass(frozen=True)
class Layout:
    """Position of a privacy loss on its grid (first index, size, index of the mean) and its mass at infinity."""

    offset: int
    size: int
    center: int
    infinite: float


@dataclass(frozen=True)
class GridLoss:
    """Masses of a privacy loss on successive grid points; they sum to 1 - `layout.infinite`."""

    layout: Layout
    masses: Array


def directions(neighboring_relation: str) -> tuple[Direction, ...]:
    """Return the directions, each a pair (P, Q), whose losses must all be bounded under a relation."""
    return ("replace",) if neighboring_relation == "replace_one" else ("remove", "add")


@dataclass(frozen=True)
class LossNodes:
    """The privacy loss of one release on a coarse quadrature, used only to choose the grid and its window."""

    losses: Array
    probabilities: Array

    @classmethod
    def of(cls, mechanism: Mechanism, direction: Direction, parts: int) -> LossNodes:
        """Return the losses and probabilities of one release; for `parts`, see `discretize`."""
        sample_rate, noise_multiplier, num_batches = mechanism
        if num_batches > 1:
            losses, probabilities, _ = _allocation_loss(mechanism, direction, parts)
            return cls(losses[probabilities > 0], probabilities[probabilities > 0])
        nodes, weights = _quadrature(_cells(noise_multiplier, direction))
        probabilities = weights * _density(nodes, sample_rate, noise_multiplier, direction)
        losses = _loss(nodes, sample_rate, noise_multiplier, direction)
        return cls(losses[probabilities > 0], probabilities[probabilities > 0])

    @cached_property
    def variance(self) -> float:
        """Variance of the loss."""
        mean = np.dot(self.probabilities, self.losses)
        return float(np.dot(self.probabilities, (self.losses - mean) ** 2))

    @cached_property
    def _log_probabilities(self) -> Array:
        return np.log(self.probabilities)

    @cached_property
    def span(self) -> float:
        """Distance between the largest and the smallest loss that the grid must hold."""
        return float(np.ptp(self.losses))

    def log_mgf(self, order: float, interval: float) -> float:
        """Return an upper bound on log E[exp(order x loss)] after the split onto a grid.

        The split widens a point mass by at most half an interval and lifts its mean by at most interval^2 / 6
        (Hoeffding's lemma).
        """
        spread = interval**2 * (abs(order) + order**2) / 6
        return float(logsumexp(order * self.losses + self._log_probabilities)) + spread


def discretize(mechanism: Mechanism, direction: Direction, interval: float, parts: int = 32) -> GridLoss:
    """Return the privacy loss of one release, or of one pass under random allocation, on multiples of `interval`.

    **Guarantee**: for every epsilon, the hockey-stick divergence of the result is at least the release's, up to the
    quadrature's relative error of about 1e-8 (all terms are positive).

    Args:
        mechanism: q in (0, 1] and sigma > 0, relative to the sensitivity of the relation. For q = 1 the direction does
            not matter. A pass of t > 1 batches needs sigma >= `LEAST_NOISE` and a direction other than "replace".
        direction: The pair of densities.
        interval: Distance of two grid points, > 0.
        parts: For a pass, the resolution of its likelihood ratio; see `allocation_law`.

    Returns:
        Masses that sum to 1 less the mass at infinity.
    """
    sample_rate, noise_multiplier, num_batches = mechanism
    if num_batches > 1:
        return _on_grid(*_allocation_loss(mechanism, direction, parts), interval)
    pieces = []
    for cells in _cells(noise_multiplier, direction):
        ends = _loss(cells[[0, -1]], sample_rate, noise_multiplier, direction) / interval
        first, last = math.floor(min(ends)) + 1, math.ceil(max(ends)) - 1
        stride = max(1, (last - first) // _MAX_EDGES)
        edges = _inverse_loss(np.arange(first, last + 1, stride) * interval, sample_rate, noise_multiplier, direction)
        pieces.append(np.sort(np.concatenate([cells, edges[(edges > cells[0]) & (edges < cells[-1])]]), kind="stable"))
    nodes, weights = _quadrature(pieces)
    masses = weights * _density(nodes, sample_rate, noise_multiplier, direction)
    return _on_grid(_loss(nodes, sample_rate, noise_multiplier, direction), masses, TAIL_MASS, interval)


def _on_grid(losses: Array, masses: Array, infinite: float, interval: float) -> GridLoss:
    """Split each point mass of P between the two nearest multiples of `interval`, preserving its mass under Q."""
    scaled = losses / interval
    below = np.floor(scaled)
    upper = masses * (np.expm1((below - scaled) * interval) / math.expm1(-interval))
    offset = int(below.min())
    index = (below - offset).astype(np.intp)
    grid = np.bincount(index, masses - upper, minlength=int(index.max()) + 2)
    grid[1:] += np.bincount(index, upper, minlength=grid.size - 1)
    center = offset + round(float(np.dot(np.arange(grid.size), grid)))
    return GridLoss(Layout(offset, grid.size, center, infinite), grid * ((1 - infinite) / grid.sum()))


def _allocation_loss(mechanism: Mechanism, direction: Direction, parts: int) -> tuple[Array, Array, float]:
    """Return losses of a pass, their probabilities under P, and the mass at infinity."""
    law = allocation_law(mechanism.noise_multiplier, mechanism.num_batches, parts)
    if direction == "remove":
        return law.log_points, law.masses * np.exp(law.log_points), law.beyond
    return -law.log_points, law.masses, law.at_zero


def _shift(noise_multiplier: float, direction: Direction) -> float:
    return 1 / noise_multiplier if direction != "replace" else 0.5 / noise_multiplier


def _cells(noise_multiplier: float, direction: Direction) -> list[Array]:
    shift = _shift(noise_multiplier, direction)
    spans = [(-_REACH, shift + _REACH)] if shift < 2 * _REACH else [(-_REACH, _REACH), (shift - _REACH, shift + _REACH)]
    return [np.linspace(low, high, math.ceil((high - low) / _CELL) + 1) for low, high in spans]


def _quadrature(pieces: list[Array]) -> tuple[Array, Array]:
    starts = np.concatenate([edges[:-1] for edges in pieces])
    halves = np.concatenate([np.diff(edges) for edges in pieces]) / 2
    nodes = (starts + halves)[:, None] + halves[:, None] * _POINTS
    return nodes.ravel(), (halves[:, None] * _WEIGHTS).ravel()


def _density(nodes: Array, sample_rate: float, noise_multiplier: float, direction: Direction) -> Array:
    shift = _shift(noise_multiplier, direction)
    density = np.exp(-(nodes**2) / 2)
    if direction != "add":
        density = (1 - sample_rate) * density + sample_rate * np.exp(-((nodes - shift) ** 2) / 2)
    return density / math.sqrt(2 * math.pi)


def _loss(nodes: Array, sample_rate: float, noise_multiplier: float, direction: Direction) -> Array:
    shift = _shift(noise_multiplier, direction)
    loss = _log_mixture(nodes * shift - shift**2 / 2, sample_rate)
    if direction == "replace":
        return loss - _log_mixture(-nodes * shift - shift**2 / 2, sample_rate)
    return -loss if direction == "add" else loss


def _log_mixture(exponent: Array, sample_rate: float) -> Array:
    """Return log(1 - q + q exp(exponent)), accurate near 0 and without overflow."""
    if sample_rate == 1:
        return exponent
    small = np.log1p(sample_rate * np.expm1(np.minimum(exponent, 30)))
    if exponent.max() < 30:
        return small
    large = math.log(sample_rate) + exponent + np.log1p((1 / sample_rate - 1) * np.exp(-np.maximum(exponent, 30)))
    return np.where(exponent < 30, small, large)


def _inverse_loss(losses: Array, sample_rate: float, noise_multiplier: float, direction: Direction) -> Array:
    """Return the z at which the loss takes the given values; z is used only for the edges of quadrature cells."""
    shift = _shift(noise_multiplier, direction)
    if direction == "replace":
        half = np.abs(losses) / 2
        log_ratio = shift**2 / 2 + (math.log1p(-sample_rate) - math.log(sample_rate))
        with np.errstate(divide="ignore"):
            log_sinh = half + np.log(-np.expm1(-2 * half)) - math.log(2) + log_ratio
        bent = np.where(log_sinh < 20, np.arcsinh(np.exp(np.minimum(log_sinh, 20))), log_sinh + math.log(2))
        return np.sign(losses) * (half + bent) / shift
    exponent = losses if direction == "remove" else -losses
    if sample_rate < 1:
        small = np.log1p(np.maximum(np.expm1(np.minimum(exponent, 30)) / sample_rate, -1 + 1e-300))
        large = exponent - math.log(sample_rate) - (1 - sample_rate) * np.exp(-np.maximum(exponent, 30))
        exponent = np.where(exponent < 30, small, large)
    return exponent / shift + shift / 2
