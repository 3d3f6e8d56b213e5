"""Tight accounting: composed privacy loss distributions, cached in the Fourier domain between queries."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft
from typing_extensions import override

from lightning_dp.accounting.allocation import LEAST_NOISE
from lightning_dp.accounting.base import Accountant, Mechanisms, split_unsampled
from lightning_dp.accounting.composed_loss import ComposedLoss
from lightning_dp.accounting.events import Mechanism
from lightning_dp.accounting.gaussian import gaussian_epsilon
from lightning_dp.accounting.loss_distribution import Direction, GridLoss, Layout, LossNodes, directions, discretize
from lightning_dp.accounting.rdp import RDPAccountant

Spectrum = npt.NDArray[np.complex128]

_MAX_INTERVAL = 1e-2
_MAX_SIZE = 1 << 20
_LOG_WINDOW_TAIL = -37.0  # log of the mass that may be beyond either end of the window
_ROUNDING = float(np.finfo(float).eps)  # of the transform of one release, as a mass
_FIXED_ERROR = math.exp(_LOG_WINDOW_TAIL) + 64 * _ROUNDING  # window, and the transforms that every query makes
_CACHED_MASSES = 1 << 23  # 64 MiB
_CACHED_POINTS = 1 << 22  # of spectra: 64 MiB


@dataclass
class _Composition:
    """Product of the spectra of all subsampled releases, per direction, on one grid."""

    relation: str
    interval: float
    size: int
    counts: Mechanisms
    spectra: dict[Direction, Spectrum]


class PLDAccountant(Accountant):
    """An accountant that composes privacy loss distributions: an upper bound, tight to about 0.1 %.

    delta(epsilon) = P[L = inf] + sum over losses l > epsilon of P[L = l] (1 - exp(epsilon - l))

    **Guarantee**: an upper bound under every relation. Each release is replaced by a dominating one on a grid that is
    fine compared with the loss of an average step; mass cut off at the ends and the rounding of the Fourier transforms
    count as infinite loss. If delta is not above that mass, the Rényi bound is reported, or inf under "replace_one".
    Ledgers without sampling are exact. A pass under random allocation is one release with a loss of its own. The grid
    follows from the ledger alone, so a resumed run reports the same epsilon as an uninterrupted one.

    Args:
        step_parts: Grid points per standard deviation of the average step's loss. The error falls with its square.
        max_support: Most grid points for one release. A coarser grid gives a looser bound, not a wrong one.

    Example:
        >>> from lightning_dp.accounting import Ledger, PrivacyEvent
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.poisson(noise_multiplier=4.0, sample_rate=0.01), count=10_000)
        >>> round(PLDAccountant().epsilon(ledger, 1e-5), 3)
        0.947

    References:
        Koskela, Jälkö and Honkela (2020), "Computing Tight Differential Privacy Guarantees Using FFT".
        Doroshenko, Ghazi, Kamath, Kumar and Manurangsi (2022), "Connect the Dots".
    """

    name = "pld"
    amplifies_from = LEAST_NOISE

    def __init__(self, *, step_parts: int = 32, max_support: int = 1 << 18) -> None:
        self._step_parts, self._max_support = step_parts, max_support
        self._nodes: dict[tuple[Mechanism, Direction], LossNodes] = {}
        self._layouts: dict[tuple[Mechanism, Direction, float], Layout] = {}
        self._losses: OrderedDict[tuple[Mechanism, Direction, float], GridLoss] = OrderedDict()
        self._log_mgfs: dict[tuple[Mechanism, Direction, float, float], float] = {}
        self._spectra: OrderedDict[tuple[Mechanism, Direction, float, int], Spectrum] = OrderedDict()
        self._composition: _Composition | None = None
        self._rdp = RDPAccountant()

    @override
    def coarse(self) -> PLDAccountant:
        return PLDAccountant(step_parts=4, max_support=1 << 14)

    @override
    def epsilon_of(self, mechanisms: Mechanisms, neighboring_relation: str, delta: float) -> float:
        mu, subsampled = split_unsampled(mechanisms)
        if not subsampled:
            return gaussian_epsilon(mu, delta)
        epsilon = max(loss.epsilon(delta) for loss in self.composed_losses(mechanisms, neighboring_relation))
        if epsilon == math.inf and neighboring_relation != "replace_one":
            return self._rdp.epsilon_of(mechanisms, neighboring_relation, delta)
        return epsilon

    def composed_losses(self, mechanisms: Mechanisms, neighboring_relation: str) -> list[ComposedLoss]:
        """Return the composed privacy loss for each direction of the neighbouring relation.

        **Guarantee**: for every epsilon, each has at least the hockey-stick divergence of the composed releases.

        Args:
            mechanisms: Result of `mechanisms_of`, not empty, with positive noise multipliers.
            neighboring_relation: Relation of the ledger.
        """
        mu, subsampled = split_unsampled(mechanisms)
        releases = dict(subsampled)
        unsampled = Mechanism(1.0, 1 / mu) if mu else None
        if unsampled:
            releases[unsampled] = 1
        relation = "replace_one" if neighboring_relation == "replace_one" else "add_or_remove_one"
        pairs = directions(relation)
        interval = self._interval(releases, pairs[0])
        while True:
            windows = {pair: self._window(releases, pair, interval) for pair in pairs}
            size = _transform_size(max(high - low for low, high in windows.values()) + 1)
            if size <= _MAX_SIZE:
                break
            interval *= 2
        composition = self._compose(subsampled, relation, pairs, interval, size)
        losses = []
        for pair in pairs:
            spectrum = composition.spectra[pair]
            if unsampled:
                spectrum = spectrum * self._spectrum(unsampled, pair, interval, size)
            low, _ = windows[pair]
            layouts = {key: self._layout(key, pair, interval) for key in releases}
            center = sum(count * layouts[key].center for key, count in releases.items())
            infinite = sum(count * (layouts[key].infinite + _ROUNDING) for key, count in releases.items())
            masses = np.roll(fft.irfft(spectrum, size), center - low)
            losses.append(ComposedLoss(np.maximum(masses, 0), low, interval, infinite + _FIXED_ERROR))
        return losses

    def _interval(self, releases: Mechanisms, pair: Direction) -> float:
        """Return the grid interval, a power of two below the loss of the average step if `max_support` allows."""
        variance = sum(count * self._node(key, pair).variance for key, count in releases.items())
        step = math.sqrt(variance / sum(releases.values()))
        widest = max(self._node(key, pair).span for key in releases)
        interval = max(min(step / self._step_parts, _MAX_INTERVAL), widest / self._max_support)
        return 2.0 ** math.floor(math.log2(interval))

    def _window(self, releases: Mechanisms, pair: Direction, interval: float) -> tuple[int, int]:
        """Return two grid indices beyond each of which the loss has mass exp(_LOG_WINDOW_TAIL) at most, by Chernoff."""
        layouts = {key: self._layout(key, pair, interval) for key in releases}
        low = sum(count * layouts[key].offset for key, count in releases.items())
        high = sum(count * (layouts[key].offset + layouts[key].size - 1) for key, count in releases.items())
        variance = sum(count * self._node(key, pair).variance for key, count in releases.items())
        likely = round(math.log2(math.sqrt(-2 * _LOG_WINDOW_TAIL / max(variance, interval**2))))
        for sign in (1, -1):
            best = math.inf
            for exponent in range(likely + 2, likely - 30, -1):  # the bound has one minimum over the orders
                order = sign * 2.0**exponent
                log_mgf = sum(count * self._log_mgf(key, pair, interval, order) for key, count in releases.items())
                bound = (log_mgf - _LOG_WINDOW_TAIL) / (2.0**exponent * interval)
                if bound > best:
                    break
                best = bound
            if sign > 0:
                high = min(high, math.ceil(best))
            else:
                low = max(low, math.floor(-best))
        return low, high

    def _compose(
        self, subsampled: Mechanisms, relation: str, pairs: tuple[Direction, ...], interval: float, size: int
    ) -> _Composition:
        """Return the product of all spectra; if possible, multiply only the spectra added since the last query."""
        cached = self._composition
        if (
            cached is None
            or (cached.relation, cached.interval, cached.size) != (relation, interval, size)
            or any(count > subsampled.get(key, 0) for key, count in cached.counts.items())
        ):
            ones = {pair: np.ones(size // 2 + 1, dtype=np.complex128) for pair in pairs}
            cached = _Composition(relation, interval, size, {}, ones)
        self._composition = None  # an interruption must not leave it half multiplied
        for key, count in subsampled.items():
            added = count - cached.counts.get(key, 0)
            if added:
                for pair in pairs:
                    _multiply_power(cached.spectra[pair], self._spectrum(key, pair, interval, size), added)
        cached.counts = dict(subsampled)
        self._composition = cached
        return cached

    def _node(self, key: Mechanism, pair: Direction) -> LossNodes:
        if (key, pair) not in self._nodes:
            self._nodes[key, pair] = LossNodes.of(key, pair if key.sample_rate < 1 else "remove", self._step_parts)
        return self._nodes[key, pair]

    def _layout(self, key: Mechanism, pair: Direction, interval: float) -> Layout:
        index = (key, pair, interval)
        if index not in self._layouts:
            self._layouts[index] = self._loss(key, pair, interval).layout
        return self._layouts[index]

    def _loss(self, key: Mechanism, pair: Direction, interval: float) -> GridLoss:
        index = (key, pair, interval)
        if index not in self._losses:
            direction: Direction = pair if key.sample_rate < 1 else "remove"
            self._losses[index] = discretize(key, direction, interval, self._step_parts)
            while len(self._losses) > 2 and sum(loss.layout.size for loss in self._losses.values()) > _CACHED_MASSES:
                self._losses.popitem(last=False)
        return self._losses[index]

    def _log_mgf(self, key: Mechanism, pair: Direction, interval: float, order: float) -> float:
        index = (key, pair, interval, order)
        if index not in self._log_mgfs:
            self._log_mgfs[index] = self._node(key, pair).log_mgf(order, interval)
        return self._log_mgfs[index]

    def _spectrum(self, key: Mechanism, pair: Direction, interval: float, size: int) -> Spectrum:
        index = (key, pair, interval, size)
        if index not in self._spectra:
            loss = self._loss(key, pair, interval)
            positions = (loss.layout.offset - loss.layout.center + np.arange(loss.layout.size)) % size
            self._spectra[index] = fft.rfft(np.bincount(positions, loss.masses, minlength=size))
            while len(self._spectra) > 2 and sum(map(len, self._spectra.values())) > _CACHED_POINTS:
                self._spectra.popitem(last=False)
        return self._spectra[index]


def _transform_size(length: int) -> int:
    """Return the least 2^k or 3 x 2^(k-1) that is at least `length`; few sizes mean few changes of grid."""
    power = 1 << max(4, (length - 1).bit_length())
    return power * 3 // 4 if power * 3 // 4 >= length else power


def _multiply_power(product: Spectrum, factor: Spectrum, count: int) -> None:
    """Multiply `product` by factor^count in place, by repeated squaring."""
    power = factor
    while True:
        if count & 1:
            product *= power
        count >>= 1
        if not count:
            return
        power = power * power
