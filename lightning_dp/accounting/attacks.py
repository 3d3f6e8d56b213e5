"""Bounds on the error rates and the advantage of attacks, from a privacy loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import erf, ndtr, ndtri

from lightning_dp.accounting.base import split_unsampled
from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.pld import PLDAccountant

#: False positive rates at which cards state the largest true positive rate.
FALSE_POSITIVE_RATES = (1e-3, 1e-2, 0.1)


@dataclass(frozen=True)
class AttackBounds:
    """Upper bounds on the success of every attack that tries to tell two neighbouring data sets apart.

    Usually the data sets differ in one training record. The attacker sees everything that was released and
    knows all other records. A positive is a claim about that record; the bounds hold both for claims that it was there
    and for claims that it was not.

    Args:
        false_positive_rates: Probabilities of a claim if the claim is wrong.
        true_positive_rates: Largest probability of a claim if the claim is right, per false positive rate.
        advantage: Largest difference of the two rates: the total variation. A guess on a fair coin is right with
            probability at most (1 + advantage) / 2.
    """

    false_positive_rates: tuple[float, ...]
    true_positive_rates: tuple[float, ...]
    advantage: float


def attack_bounds(
    ledger: Ledger,
    false_positive_rates: Sequence[float] = FALSE_POSITIVE_RATES,
    *,
    accountant: PLDAccountant | None = None,
) -> AttackBounds:
    """Return the largest true positive rates and the largest advantage of any attack on a ledger's releases.

    true positive rate <= min over epsilon of exp(epsilon) x false positive rate + delta(epsilon)

    **Guarantee**: upper bounds under the ledger's relation, from the loss distribution of "pld". If no release is
    subsampled, they are exact: Phi(Phi^-1(false positive rate) + mu) and 2 Phi(mu / 2) - 1. No delta is needed.

    Args:
        ledger: The releases.
        false_positive_rates: In [0, 1].
        accountant: Accountant to use, with its cache; by default a new one.

    Returns:
        The bounds. Public.

    Raises:
        ValueError: If a rate is out of range.

    Example:
        >>> from lightning_dp.accounting import PrivacyEvent
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.gaussian(noise_multiplier=1.0))
        >>> bounds = attack_bounds(ledger)
        >>> [round(rate, 3) for rate in bounds.true_positive_rates], round(bounds.advantage, 3)
        ([0.018, 0.092, 0.389], 0.383)

    References:
        Dong, Roth and Su (2022), "Gaussian Differential Privacy", Proposition 6: from delta(epsilon) to error rates.
        Kairouz, Oh and Viswanath (2015), "The Composition Theorem for Differential Privacy", Theorem 2.1.
    """
    rates = tuple(float(rate) for rate in false_positive_rates)
    for rate in rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"Expected 0 <= false positive rate <= 1, got {rate}. Pass a share of wrong claims.")
    accountant = accountant or PLDAccountant()
    mechanisms = accountant.mechanisms_of(ledger)
    if not mechanisms:
        return AttackBounds(rates, rates, 0.0)
    if any(key.noise_multiplier == 0 for key in mechanisms):
        return AttackBounds(rates, (1.0,) * len(rates), 1.0)
    mu, subsampled = split_unsampled(mechanisms)
    if not subsampled:
        powers = tuple(float(ndtr(ndtri(rate) + mu)) for rate in rates)
        return AttackBounds(rates, powers, float(erf(mu / math.sqrt(8))))
    losses = accountant.composed_losses(mechanisms, ledger.neighboring_relation)
    powers = tuple(max(loss.true_positive_rate(rate) for loss in losses) for rate in rates)
    return AttackBounds(rates, powers, max(loss.advantage() for loss in losses))
