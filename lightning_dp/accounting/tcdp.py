"""Accounting by truncated concentrated differential privacy: closed forms, to cross-check other accountants."""

from __future__ import annotations

import math

from typing_extensions import override

from lightning_dp.accounting.base import Accountant, Mechanisms, check_delta, refuse_replace_one, split_unsampled
from lightning_dp.accounting.ledger import Ledger

_MAX_RATE = 0.1
_MAX_RHO = 0.1  # with both, the lemma's log(1 / q) >= 3 rho (2 + log2(1 / rho)) holds: 2.30 against at most 1.60


def tcdp_epsilon(rho: float, omega: float, delta: float) -> float:
    """Return the epsilon of a (rho, omega)-tCDP mechanism.

    epsilon = rho + 2 sqrt(rho log(1 / delta)) if log(1 / delta) <= (omega - 1)^2 rho,
    else rho omega + log(1 / delta) / (omega - 1)

    **Guarantee**: an upper bound, namely the minimum over orders 1 < a < omega of rho a + log(1 / delta) / (a - 1).

    Args:
        rho: Bound on the Rényi divergences, D_a <= rho a for all a < omega; in [0, inf).
        omega: In (1, inf]; inf is zero-concentrated differential privacy.
        delta: In (0, 1).

    Returns:
        Epsilon in [0, inf).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(tcdp_epsilon(rho=0.1, omega=math.inf, delta=1e-5), 6)
        2.245966
        >>> round(tcdp_epsilon(rho=0.1, omega=6.0, delta=1e-5), 6)
        2.902585

    References:
        Bun, Dwork, Rothblum and Steinke (2018), "Composable and Versatile Privacy via Truncated CDP", conversion to
        approximate differential privacy.
    """
    check_delta(delta)
    if not 0 <= rho < math.inf:
        raise ValueError(f"Expected 0 <= rho < inf, got rho={rho}. It is 1 / (2 sigma^2) for a Gaussian.")
    if not omega > 1:
        raise ValueError(
            f"Expected omega > 1, got omega={omega}: no order is bounded, so no epsilon is. Sample at a lower rate, or "
            'use accountant="pld".'
        )
    if rho == 0 and omega == math.inf:
        return 0.0
    log_delta = math.log(1 / delta)
    if omega == math.inf or log_delta <= (omega - 1) ** 2 * rho:
        return rho + 2 * math.sqrt(rho * log_delta)
    return rho * omega + log_delta / (omega - 1)


class TCDPAccountant(Accountant):
    """An accountant by truncated concentrated differential privacy, a closed form to cross-check the others.

    rho = 1 / (2 noise_multiplier^2), omega = inf      no sampling
    rho' = 13 q^2 rho, omega' = log(1 / q) / (4 rho)      sampled at rate q
    rho adds up over steps, omega is the smallest of all; epsilon from `tcdp_epsilon`

    **Guarantee**: an upper bound under "add_or_remove_one" and "zero_out", several times the epsilon of "pld". The
    lemma on the sampled form holds for q <= 0.1 and rho <= 0.1, a noise multiplier of at least sqrt(5) = 2.24; other
    sampled releases are refused. Releases without sampling have no such limit: they add their rho and do not change
    omega. Under "replace_one" Poisson sampling is refused. For sampled runs, a noise multiplier calibrated with this
    accountant is at least 2.24, even if the target would allow less noise.

    Example:
        >>> from lightning_dp.accounting import PrivacyEvent
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.poisson(noise_multiplier=4.0, sample_rate=0.01), count=10_000)
        >>> round(TCDPAccountant().epsilon(ledger, 1e-5), 4)
        4.7316

    References:
        Bun, Dwork, Rothblum and Steinke (2018), "Composable and Versatile Privacy via Truncated CDP", composition and
        amplification by subsampling. The proof bounds (1 - q) B + q A against (1 - q) B + q A' for A, A', B close to
        one another; a Poisson sample with and without one record is the case A' = B.
    """

    name = "tcdp"

    @override
    def epsilon_or_inf(self, ledger: Ledger, delta: float) -> float:
        for sample_rate, noise_multiplier, _ in self.mechanisms_of(ledger):
            if sample_rate < 1 and noise_multiplier > 0 and _rho(noise_multiplier) > _MAX_RHO:
                return math.inf
        return self.epsilon(ledger, delta)

    @override
    def epsilon_of(self, mechanisms: Mechanisms, neighboring_relation: str, delta: float) -> float:
        mu, subsampled = split_unsampled(mechanisms)
        if subsampled and neighboring_relation == "replace_one":
            raise refuse_replace_one(self.name)
        rhos, omega = [mu**2 / 2], math.inf
        for (sample_rate, noise_multiplier, _), count in subsampled.items():
            rho = _rho(noise_multiplier)
            _check_lemma(sample_rate, noise_multiplier, rho)
            rhos.append(count * 13 * sample_rate**2 * rho)
            omega = min(omega, -math.log(sample_rate) / (4 * rho))
        return tcdp_epsilon(math.fsum(rhos), omega, delta)


def _rho(noise_multiplier: float) -> float:
    return 1 / (2 * noise_multiplier**2)


def _check_lemma(sample_rate: float, noise_multiplier: float, rho: float) -> None:
    """Raise ValueError unless the amplification lemma applies."""
    if not sample_rate <= _MAX_RATE:
        raise ValueError(
            f"Expected sample_rate <= {_MAX_RATE} for accountant='tcdp', got sample_rate={sample_rate}: its "
            'amplification lemma ends there. Use accountant="pld".'
        )
    if not rho <= _MAX_RHO:
        raise ValueError(
            f"Expected noise_multiplier >= 2.24 (rho <= {_MAX_RHO}) for accountant='tcdp', got "
            f"noise_multiplier={noise_multiplier} (rho={rho:.4g}): its amplification lemma ends there. "
            'Use accountant="pld".'
        )
