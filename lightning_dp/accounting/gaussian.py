"""Exact accounting of Gaussian releases that every sample takes part in."""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import erf, log_ndtr, ndtri
from typing_extensions import override

from lightning_dp.accounting.base import Accountant, Mechanisms, check_delta, split_unsampled

_MU_WIDE = 1e4  # from here on the second term of delta is below the rounding of the first


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon of a mu-GDP mechanism.

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu), solved for epsilon

    **Guarantee**: exact up to rounding, and rounded upwards.

    Args:
        mu: Sensitivity over standard deviation, in [0, inf); the root of the sum of squares for a composition.
        delta: In (0, 1).

    Returns:
        Epsilon in [0, inf).

    Raises:
        ValueError: If mu or delta is out of range.

    Example:
        >>> round(gaussian_epsilon(mu=1.0, delta=1e-5), 6)
        4.377178

    References:
        Balle and Wang (2018), "Improving the Gaussian Mechanism for Differential Privacy", Theorem 8.
        Dong, Roth and Su (2022), "Gaussian Differential Privacy", Corollary 1.
    """
    check_delta(delta)
    if not 0 <= mu < math.inf:
        raise ValueError(f"Expected 0 <= mu < inf, got mu={mu}. It is the inverse of the noise multiplier.")
    if delta >= erf(mu / math.sqrt(8)):
        return 0.0
    upper = float(mu**2 / 2 - mu * ndtri(delta))  # the first term alone equals delta here
    if mu > _MU_WIDE:
        return upper
    log_delta = math.log(delta)

    def excess(epsilon: float) -> float:
        first = float(log_ndtr(mu / 2 - epsilon / mu))
        second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
        return first + math.log(-math.expm1(min(second - first, -1e-300))) - log_delta

    if excess(upper) > 0:  # rounding only
        return upper
    root = float(brentq(excess, 0.0, upper, xtol=1e-300, rtol=1e-14))
    return min(root * (1 + 1e-11 + 1e-14 / mu), upper)  # for small mu the two terms nearly cancel


class GDPAccountant(Accountant):
    """An accountant with the exact epsilon of runs without subsampling.

    mu^2 = sum of 1 / noise_multiplier^2; epsilon from `gaussian_epsilon`

    **Guarantee**: exact for any composition of Gaussians. A pass over shuffled data counts as one Gaussian. Poisson
    sampling is refused, because the central limit theorem that is used for it elsewhere is not a bound.

    Example:
        >>> from lightning_dp.accounting import Ledger, PrivacyEvent
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.gaussian(noise_multiplier=2.0), count=4)
        >>> round(GDPAccountant().epsilon(ledger, 1e-5), 6)
        4.377178

    References:
        Dong, Roth and Su (2022), "Gaussian Differential Privacy", Section 3.
    """

    name = "gdp"

    @override
    def epsilon_of(self, mechanisms: Mechanisms, neighboring_relation: str, delta: float) -> float:
        mu, subsampled = split_unsampled(mechanisms)
        if subsampled:
            rate = max(key.sample_rate for key in subsampled)
            raise ValueError(
                f"Expected releases without sampling for accountant='gdp', got sample_rate={rate}: the Gaussian "
                'approximation of subsampled releases is not an upper bound. Use accountant="pld".'
            )
        return gaussian_epsilon(mu, delta)
