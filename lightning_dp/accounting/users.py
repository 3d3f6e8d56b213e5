"""The epsilon of a user with several records, in a run that protects single records."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant as LibraryAccountant
from scipy.stats import binom

from lightning_dp.accounting.base import check_delta
from lightning_dp.accounting.events import Mechanism, check_count
from lightning_dp.accounting.ledger import Ledger


def user_epsilon(ledger: Ledger, delta: float, *, records_per_user: int, discretization: float = 1e-3) -> float:
    """Return the epsilon of a run with record-level privacy for adding or removing all records of one user.

    with the user     sum over k of Binomial(G, q)(k) N(k, sigma^2)
    without           N(0, sigma^2)

    Of the user's at most G records, k join a Poisson sample and move the sum by at most k times the bound on one. In
    releases without sampling and in passes, all G records may be in one batch, which is a Gaussian with G times the
    sensitivity, without amplification.

    **Guarantee**: an upper bound, from the privacy loss distributions of dp-accounting. For one record per user it is
    the epsilon of "pld", up to that library's grid, except that allocation passes are not amplified.

    Args:
        ledger: The releases.
        delta: In (0, 1).
        records_per_user: G, the largest number of records of one user, at least 1. A public limit, not a count of data.
        discretization: Interval of the library's grid; a finer one takes longer and gives a little less. One distinct
            noise multiplier takes seconds at 1e-3.

    Returns:
        Epsilon in [0, inf]. Public.

    Raises:
        ValueError: If an argument is out of range, the relation is "replace_one", or the ledger protects users already.

    Example:
        >>> from lightning_dp.accounting import PrivacyEvent
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.gaussian(noise_multiplier=4.0))
        >>> round(user_epsilon(ledger, 1e-5, records_per_user=4), 2)  # as noise multiplier 1 for one record
        4.38

    References:
        Choquette-Choo, Ganesh, Steinke and Thakurta (2024), "Privacy Amplification for Matrix Mechanisms": mixtures of
        Gaussians.
        Charles et al. (2024), "Fine-Tuning Large Language Models with User-Level Differential Privacy".
    """
    check_delta(delta)
    count = check_count(records_per_user, name="records_per_user", minimum=1)
    if ledger.neighboring_relation == "replace_one":
        raise ValueError(
            'Expected neighboring_relation="add_or_remove_one" or "zero_out" for records_per_user, got "replace_one". '
            "The bound is for adding or removing a user's records."
        )
    if ledger.unit == "user":
        raise ValueError(
            f"Expected a run that protects records for records_per_user, got records_per_user={count} for one that "
            "protects users, whose epsilon holds for them already. Leave it out."
        )
    accountant = LibraryAccountant(value_discretization_interval=discretization)
    for mechanism, times in ledger.mechanisms().items():
        if mechanism.noise_multiplier == 0:
            return math.inf
        accountant.compose(dp_accounting.SelfComposedDpEvent(_user_event(mechanism, count), times))
    return float(accountant.get_epsilon(delta))


def _user_event(mechanism: Mechanism, records_per_user: int) -> dp_accounting.DpEvent:
    sample_rate, noise_multiplier, num_batches = mechanism
    if sample_rate == 1 or num_batches > 1:
        return dp_accounting.GaussianDpEvent(noise_multiplier / records_per_user)
    joined = np.arange(records_per_user + 1)
    probabilities = binom.pmf(joined, records_per_user, sample_rate)
    likely = probabilities > 0  # omitted terms underflow
    return MixtureOfGaussiansDpEvent(
        noise_multiplier, joined[likely].tolist(), (probabilities[likely] / probabilities[likely].sum()).tolist()
    )
