"""Rényi accounting: looser than the privacy loss distribution, and very cheap."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from typing_extensions import override

from lightning_dp.accounting.base import Accountant, Mechanisms, refuse_replace_one, split_unsampled

_LIBRARY_LOG = logging.getLogger("absl")
_ORDERS = np.array(DEFAULT_RDP_ORDERS)
_ROUNDING = 1e-14  # the divergences of tiny rates are differences of numbers near 1


@contextmanager
def _without_skipped_orders() -> Iterator[None]:
    """Drops the library's line for each order it skips: the minimum over the others is a bound all the same."""

    def keep(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in record.getMessage()

    _LIBRARY_LOG.addFilter(keep)
    try:
        yield
    finally:
        _LIBRARY_LOG.removeFilter(keep)


class RDPAccountant(Accountant):
    """Epsilon from Rényi divergences.

    rdp(a) = sum of counts x D_a(one release);  epsilon = min over a of rdp(a) + log(1 - 1/a) - log(a delta) / (a - 1)

    Guarantee: an upper bound under "add_or_remove_one" and "zero_out"; under "replace_one" for releases without
    sampling only. One vector of divergences is kept for each distinct release, so a query costs a sum of vectors.

    Example:
        >>> from lightning_dp.accounting import Ledger, PrivacyEvent
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.poisson(noise_multiplier=4.0, sample_rate=0.01), count=10_000)
        >>> round(RDPAccountant().epsilon(ledger, 1e-5), 4)
        1.0355

    References:
        Mironov, Talwar and Zhang (2019), "Rényi Differential Privacy of the Sampled Gaussian Mechanism".
        Canonne, Kamath and Steinke (2020), "The Discrete Gaussian for Differential Privacy", Proposition 12.
    """

    name = "rdp"

    def __init__(self) -> None:
        self._vectors: dict[tuple[float, float], npt.NDArray[np.float64]] = {}

    @override
    def _epsilon(self, mechanisms: Mechanisms, neighboring_relation: str, delta: float) -> float:
        mu, subsampled = split_unsampled(mechanisms)
        if subsampled and neighboring_relation == "replace_one":
            raise refuse_replace_one(self.name)
        total = _ORDERS * mu**2 / 2
        for key, count in subsampled.items():
            total += count * self._vector(*key)
        epsilon, _ = compute_epsilon(_ORDERS, total, delta)
        return float(epsilon)

    def _vector(self, sample_rate: float, noise_multiplier: float) -> npt.NDArray[np.float64]:
        key = (sample_rate, noise_multiplier)
        if key not in self._vectors:
            accountant = RdpAccountant(_ORDERS)
            with _without_skipped_orders():
                accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)))
            self._vectors[key] = np.maximum(accountant.rdp, 0) + _ROUNDING
        return self._vectors[key]
