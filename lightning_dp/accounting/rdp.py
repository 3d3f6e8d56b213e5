"""Rényi accounting: looser than the privacy loss distribution."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from scipy.special import gammaln, logsumexp
from typing_extensions import override

from lightning_dp.accounting.base import Accountant, Mechanisms, refuse_replace_one, split_unsampled
from lightning_dp.accounting.events import Mechanism

Array = npt.NDArray[np.float64]

_LIBRARY_LOG = logging.getLogger("absl")
_MAX_MOMENT = 256  # of the likelihood ratio of a pass; beyond, a pass counts as one Gaussian
_ROUNDING = 1e-14  # the divergences of tiny rates are differences of numbers near 1


@contextmanager
def _without_skipped_orders() -> Iterator[None]:
    """Drop the library's log line for each skipped order, because the minimum over the others is still a bound."""

    def keep(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in record.getMessage()

    _LIBRARY_LOG.addFilter(keep)
    try:
        yield
    finally:
        _LIBRARY_LOG.removeFilter(keep)


class RDPAccountant(Accountant):
    """An accountant that adds up Rényi divergences.

    rdp(a) = sum of counts x D_a(one release);  epsilon = min over a of rdp(a) + log(1 - 1/a) - log(a delta) / (a - 1)

    **Guarantee**: an upper bound under "add_or_remove_one" and "zero_out"; under "replace_one" for releases without
    sampling only. Passes under random allocation are bounded too, but loosely: epsilon is commonly two to four
    times the epsilon of "pld", and more for many passes. One array of divergences is cached for each mechanism, for all
    accountants together, so a query costs a sum of arrays.

    Example:
        >>> from lightning_dp.accounting import Ledger, PrivacyEvent
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.poisson(noise_multiplier=4.0, sample_rate=0.01), count=10_000)
        >>> round(RDPAccountant().epsilon(ledger, 1e-5), 4)
        1.0355

    References:
        Mironov, Talwar and Zhang (2019), "Rényi Differential Privacy of the Sampled Gaussian Mechanism".
        Canonne, Kamath and Steinke (2020), "The Discrete Gaussian for Differential Privacy", Proposition 12.
        Feldman and Shenfeld (2025), "Privacy Amplification by Random Allocation", Section 6.
    """

    name = "rdp"
    amplifies_from = 0.0
    orders: ClassVar[Array] = np.array(DEFAULT_RDP_ORDERS)
    _whole_orders: ClassVar[bool] = False

    @override
    def coarse(self) -> RDPAccountant:
        """Return one that uses whole orders alone: their divergences are short sums, the others take most of the
        time.
        """
        return _WholeOrders()

    @override
    def epsilon_of(self, mechanisms: Mechanisms, neighboring_relation: str, delta: float) -> float:
        mu, subsampled = split_unsampled(mechanisms)
        if subsampled and neighboring_relation == "replace_one":
            raise refuse_replace_one(self.name)
        total = np.tile(self.orders * mu**2 / 2, (2, 1))  # with a sample against without it, and the reverse
        for key, count in subsampled.items():
            total += count * divergences_of(key, self._whole_orders)
        return max(float(compute_epsilon(self.orders, divergences, delta)[0]) for divergences in total)


class _WholeOrders(RDPAccountant):
    """The bound of whole orders: an upper bound as well, and looser where the best order is small."""

    orders = RDPAccountant.orders[RDPAccountant.orders % 1 == 0]
    _whole_orders = True


@lru_cache(maxsize=4096)
def divergences_of(key: Mechanism, whole_orders: bool = False) -> Array:
    """Return upper bounds on the Rényi divergences of one sampled mechanism at ``RDPAccountant.orders``, cached.

    Args:
        key: the mechanism.
        whole_orders: leave the other orders out.

    Returns:
        Shape (2, number of orders): with a sample against without it, and the reverse. Public and read-only.
    """
    bound = _allocation_divergences if key.num_batches > 1 else _poisson_divergences
    found = bound(key, (_WholeOrders if whole_orders else RDPAccountant).orders)
    found.setflags(write=False)
    return found


def _poisson_divergences(key: Mechanism, orders: Array) -> Array:
    accountant = RdpAccountant(orders)
    with _without_skipped_orders():
        accountant.compose(PoissonSampledDpEvent(key.sample_rate, GaussianDpEvent(key.noise_multiplier)))
    return np.tile(np.maximum(accountant.rdp, 0) + _ROUNDING, (2, 1))


def _allocation_divergences(key: Mechanism, orders: Array) -> Array:
    """Return upper bounds on the Rényi divergences of one pass under random allocation, shape (2, orders).

    remove: log E[S^a] / (a - 1), exact for integers; log E[S^a] is convex in a, so a chord bounds it in between
    add:    (a + t - 1) / (2 t sigma^2), because S is at least the geometric mean of its t terms
    """
    _, noise_multiplier, num_batches = key
    moments = _log_moments(noise_multiplier, num_batches)
    gaussian = orders / (2 * noise_multiplier**2)
    chords = np.interp(orders, np.arange(_MAX_MOMENT + 1), moments, right=np.inf)
    add = (orders + num_batches - 1) / (2 * num_batches * noise_multiplier**2)
    bounds = np.stack([np.maximum(chords, 0) / (orders - 1), add])
    return np.asarray(np.minimum(bounds, gaussian) + _ROUNDING)


def _log_moments(noise_multiplier: float, num_batches: int) -> Array:
    """Return log E[S^a] for a = 0, 1, ...: a! times a coefficient of the t-th power of one term's series."""
    orders = np.arange(_MAX_MOMENT + 1)
    term = orders * (orders - 1) / (2 * noise_multiplier**2) - orders * np.log(num_batches) - gammaln(orders + 1)
    power, count = np.where(orders == 0, 0.0, -np.inf), num_batches
    while count:
        if count & 1:
            power = _log_product(power, term)
        count >>= 1
        if count:
            term = _log_product(term, term)
    return np.asarray(power + gammaln(orders + 1))


def _log_product(first: Array, second: Array) -> Array:
    """Return the logarithms of the coefficients of a product of two power series, cut to their length."""
    behind = np.subtract.outer(np.arange(first.size), np.arange(first.size))
    return np.asarray(logsumexp(np.where(behind >= 0, first + second[behind], -np.inf), axis=1))
