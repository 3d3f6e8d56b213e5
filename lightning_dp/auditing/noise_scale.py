"""An upper bound on the noise of one run whose canaries do not disturb each other."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from lightning_dp import _validate as check
from lightning_dp.accounting import Ledger, PLDAccountant, PrivacyEvent, gaussian_epsilon
from lightning_dp.auditing.estimates import check_coins, check_scores, clopper_pearson_upper

_SEARCHED = 2.0**10
_PRECISION = 1e-3


def scaled_ledger(ledger: Ledger, factor: float) -> Ledger:
    """Return a new ledger with a ledger's mechanisms and every noise multiplier multiplied by ``factor``.

    Args:
        ledger: all releases of the run; a pass that was cut short counts as a whole one.
        factor: > 0.

    Example:
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.gaussian(noise_multiplier=2.0), count=3)
        >>> scaled_ledger(ledger, 0.5).mechanisms()
        {Mechanism(sample_rate=1.0, noise_multiplier=1.0, num_batches=1): 3}
    """
    scaled = Ledger(ledger.neighboring_relation, ledger.unit)
    for (rate, sigma, num_batches), count in ledger.mechanisms().items():
        if num_batches > 1:
            event = PrivacyEvent.allocation(noise_multiplier=sigma * factor, num_batches=num_batches)
            scaled.record(event, count * num_batches)
        elif rate == 1:
            scaled.record(PrivacyEvent.gaussian(noise_multiplier=sigma * factor), count)
        else:
            scaled.record(PrivacyEvent.poisson(noise_multiplier=sigma * factor, sample_rate=rate), count)
    return scaled


def epsilon_noise_scale(
    scores: ArrayLike, included: ArrayLike, *, ledger: Ledger, delta: float, confidence: float = 0.95
) -> float:
    """Return a lower confidence bound on epsilon from one run, for canaries that do not disturb each other.

    Two rules guess "in": for scores above 0, and for the higher half. The better rule counts, each at half of
    1 - confidence. If the noise were c times the ledger's, a guess would be right with probability at most
    a(c) = (1 + TV(c)) / 2, with TV the total variation between the composed releases with and without a record. So
    the number of right guesses would be stochastically at most Bin(m, a(c)). The smallest refuted c gives

        epsilon >= epsilon of the ledger with c times the noise, at delta

    If nothing is subsampled, this is the bound of Gaussian differential privacy: a(c) = Phi(mu / 2c).

    **Guarantee**: if the ledger is true, the bound exceeds its epsilon at ``delta`` with probability at most
    ``1 - confidence``, provided that a fair coin included each canary, and that each was sampled separately and adds to
    coordinates of its own. Real records may add to these coordinates too, even depending on earlier releases: given the
    data, their part is a function of earlier releases, which anyone could subtract.

    Args:
        scores: log likelihood ratios of "in" against "out", shape (m,).
        included: shape (m,), True where the coin said "in".
        ledger: the releases that the run claims.
        delta: in (0, 1).
        confidence: in (0, 1).

    Returns:
        A bound in [0, inf); 0 if the ledger is empty or holds an unprotected release, because nothing can be refuted.

    Raises:
        ValueError: numbers or shapes out of range.

    Example:
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.gaussian(noise_multiplier=0.5))
        >>> coins = np.arange(1000) % 2 == 0
        >>> scores = coins - 0.5  # as without noise
        >>> round(epsilon_noise_scale(scores, coins, ledger=ledger, delta=1e-5), 1)
        36.5
        >>> round(gaussian_epsilon(2.0, 1e-5), 1)  # of the noise that was stated
        10.0

    References:
        Steinke, Nasr and Jagielski 2023, Privacy Auditing with One (1) Training Run, section 3 (one run).
        Nasr et al. 2023, Tight Auditing of Differentially Private Machine Learning, section 4 (from one rate to the
        curve).
    """
    values = check_scores("scores", scores)
    coins = check_coins(included, values)
    order = np.argsort(-values, kind="stable")
    correct = max(
        int(coins[order[:guessed_in]].sum() + (~coins[order[guessed_in:]]).sum())
        for guessed_in in (int((values > 0).sum()), values.size // 2)
    )
    significance = (1 - check.check_probability("confidence", confidence)) / 2  # two rules
    advantage = 1 - 2 * clopper_pearson_upper(values.size - correct, values.size, significance)
    mechanisms = ledger.mechanisms()
    if advantage <= 0 or not mechanisms or any(key.noise_multiplier == 0 for key in mechanisms):
        return 0.0
    if all(key.sample_rate == 1 for key in mechanisms):
        return gaussian_epsilon(float(2 * ndtri((1 + advantage) / 2)), delta)
    scale = _smallest_refuted(ledger, advantage)
    return 0.0 if scale is None else PLDAccountant().epsilon(scaled_ledger(ledger, scale), delta)


def _smallest_refuted(ledger: Ledger, advantage: float) -> float | None:
    """Return the smallest c with a total variation of at most ``advantage`` (epsilon 0 at that delta), if any."""
    accountant = PLDAccountant()

    def refuted(log_scale: float) -> bool:
        return accountant.epsilon(scaled_ledger(ledger, math.exp(log_scale)), advantage) == 0

    low, high = -math.log(_SEARCHED), math.log(_SEARCHED)
    if not refuted(high):
        return None
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return math.exp(high)
