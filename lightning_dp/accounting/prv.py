"""Opacus' accountant of privacy random variables, with clear errors for cases that it does not support."""

from __future__ import annotations

import math
import warnings

import numpy as np
from typing_extensions import override

from lightning_dp.accounting.base import Accountant, Mechanisms, refuse_replace_one, split_unsampled


class PRVAccountant(Accountant):
    """An accountant that composes privacy random variables numerically, by opacus.

    epsilon = estimate at delta (1 - 1e-3) + 0.01, the upper end of opacus' error interval

    **Guarantee**: the upper bound of opacus' implementation. It includes an absolute 0.01, so small epsilons
    are far from tight. Under "replace_one" Poisson sampling is refused. Only the last answer is cached, so use "pld"
    for schedules.

    Example:
        >>> from lightning_dp.accounting import Ledger, PrivacyEvent
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.poisson(noise_multiplier=4.0, sample_rate=0.01), count=10_000)
        >>> round(PRVAccountant().epsilon(ledger, 1e-5), 2)
        0.96

    References:
        Gopi, Lee and Wutschitz (2021), "Numerical Composition of Differential Privacy", Theorem 5.5.
    """

    name = "prv"

    def __init__(self) -> None:
        self._last: tuple[Mechanisms, str, float] | None = None
        self._last_epsilon = 0.0

    @override
    def epsilon_of(self, mechanisms: Mechanisms, neighboring_relation: str, delta: float) -> float:
        mu, subsampled = split_unsampled(mechanisms)
        if subsampled and neighboring_relation == "replace_one":
            raise refuse_replace_one(self.name)
        query = (mechanisms, neighboring_relation, delta)
        if query != self._last:
            history = [(sigma, rate, count) for (rate, sigma, _), count in subsampled.items()]
            self._last_epsilon = _opacus_epsilon(history + ([(1 / mu, 1.0, 1)] if mu else []), delta)
            self._last = query
        return self._last_epsilon


def _opacus_epsilon(history: list[tuple[float, float, int]], delta: float) -> float:
    from opacus.accountants import PRVAccountant as OpacusPRVAccountant  # takes one or two seconds

    accountant = OpacusPRVAccountant()
    accountant.history = history
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():  # log(1 - q) at q = 1, exp beyond the domain
            warnings.filterwarnings("ignore", message="Optimal order")  # it only sets the width of the domain
            epsilon = max(float(accountant.get_epsilon(delta)), 0.0)
    except (RuntimeError, ValueError, OverflowError, IndexError, MemoryError) as error:
        raise _out_of_reach(str(error)) from error
    if not 0 <= epsilon < math.inf:
        raise _out_of_reach(f"its result is {epsilon}")
    return epsilon


def _out_of_reach(cause: str) -> ValueError:
    return ValueError(
        f'Expected a history within the numerical reach of accountant="prv", but {cause.rstrip(".")}. '
        'Use accountant="pld".'
    )
