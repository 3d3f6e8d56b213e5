"""The base class of accountants, which compute epsilon from a ledger."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from lightning_dp.accounting.events import Mechanism
from lightning_dp.accounting.ledger import Ledger

Mechanisms = dict[Mechanism, int]  # how often each was run


class Accountant(ABC):
    """A method to compute an upper bound on epsilon for the releases in a ledger.

    epsilon >= inf{e : the composition of the ledger's releases is (e, delta)-DP}

    **Guarantee**: the result is never below the true epsilon; a ledger that the accountant cannot bound is refused. An
    empty ledger costs 0 (printed as "no steps recorded"), and a ledger with an unprotected release costs inf. Results
    depend on ledger and delta only; earlier queries merely make them faster.
    """

    name: ClassVar[str]
    #: Noise multiplier from which on a pass under random allocation costs less than the one Gaussian that bounds it.
    amplifies_from: ClassVar[float] = math.inf

    def epsilon(self, ledger: Ledger, delta: float) -> float:
        """Return an upper bound on the epsilon that a ledger has spent at `delta`.

        Args:
            ledger: The releases.
            delta: In (0, 1).

        Returns:
            Epsilon in [0, inf]. Public.

        Raises:
            ValueError: If delta is out of range or this accountant has no sound bound for the ledger's releases.
        """
        check_delta(delta)
        mechanisms = self.mechanisms_of(ledger)
        if not mechanisms:
            return 0.0
        if any(key.noise_multiplier == 0 for key in mechanisms):
            return math.inf
        return self.epsilon_of(mechanisms, ledger.neighboring_relation, float(delta))

    def mechanisms_of(self, ledger: Ledger) -> Mechanisms:
        """Return the mechanisms to account for; a pass with noise below `amplifies_from` counts as one Gaussian."""
        return without_allocation(ledger.mechanisms(), below=self.amplifies_from)

    def epsilon_or_inf(self, ledger: Ledger, delta: float) -> float:
        """Return `epsilon`, or inf if there is too little noise for a bound.

        Searches over noise multipliers call this: it never grows with the noise, and if finite it equals `epsilon`.

        Args:
            ledger: The releases.
            delta: In (0, 1).

        Returns:
            Epsilon in [0, inf]. Public.

        Raises:
            ValueError: If delta is out of range or more noise would not give this accountant a bound.
        """
        return self.epsilon(ledger, delta)

    def coarse(self) -> Accountant:
        """Return a cheaper accountant with nearly the same epsilon, for searches; by default this accountant itself."""
        return self

    @abstractmethod
    def epsilon_of(self, mechanisms: Mechanisms, neighboring_relation: str, delta: float) -> float:
        """Return the epsilon of at least one mechanism; every noise multiplier must be positive."""


def split_unsampled(mechanisms: Mechanisms) -> tuple[float, Mechanisms]:
    """Separate unsampled releases, which compose in closed form, from subsampled ones.

    mu^2 = sum over unsampled releases of 1 / noise_multiplier^2

    Args:
        mechanisms: Counts of releases with positive noise multipliers.

    Returns:
        mu (0 if every release is subsampled) and the subsampled mechanisms.
    """
    mu_squared = math.fsum(count / key.noise_multiplier**2 for key, count in mechanisms.items() if key.sample_rate == 1)
    return math.sqrt(mu_squared), {key: count for key, count in mechanisms.items() if key.sample_rate < 1}


def without_allocation(mechanisms: Mechanisms, *, below: float) -> Mechanisms:
    """Return the mechanisms, with each allocation pass of too little noise replaced by one Gaussian, an upper bound.

    A sample is in one batch of the pass. Given that batch, the pass is one Gaussian, and mixtures are no worse.

    Args:
        mechanisms: Counts of mechanisms.
        below: Noise multiplier from which on passes stay unchanged.
    """
    counts: Mechanisms = {}
    for key, count in mechanisms.items():
        if key.num_batches > 1 and key.noise_multiplier < below:
            key = Mechanism(1.0, key.noise_multiplier)
        counts[key] = counts.get(key, 0) + count
    return counts


def refuse_replace_one(name: str) -> ValueError:
    """Return the error of an accountant that has no sound bound for Poisson sampling under "replace_one"."""
    return ValueError(
        f'Expected an accountant with a bound for Poisson sampling under neighboring_relation="replace_one", '
        f'got accountant={name!r}. Use accountant="pld", or neighboring_relation="add_or_remove_one".'
    )


def check_delta(delta: float) -> None:
    """Raise ValueError unless 0 < delta < 1."""
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got delta={delta}. Choose it well below 1 / (size of the data set).")
