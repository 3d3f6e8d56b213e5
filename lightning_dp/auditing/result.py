"""The bounds that an audit found, next to the claim."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lightning_dp import _validate as check
from lightning_dp.accounting import Ledger
from lightning_dp.auditing.noise_scale import epsilon_noise_scale
from lightning_dp.auditing.one_run import epsilon_one_run, epsilon_one_run_gdp
from lightning_dp.reporting.statement import describe_epsilon


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """Lower confidence bounds on epsilon from one run, and the epsilon that was claimed.

    A bound above the claim refutes the claim at the given confidence. A bound below it only shows that this attack
    found no leak.

    Args:
        kind: "gradient" or "input": the space of the canaries.
        num_canaries: m.
        num_included: number of canaries whose coin said "in".
        confidence: probability with which ``epsilon_lower`` does not exceed a true claim.
        delta: delta of all epsilons.
        claimed_epsilon: epsilon by the accountant.
        epsilon_one_run: bound that holds for any mechanism.
        epsilon_gdp: bound that relies on Gaussian noise; None if no such bound holds.
    """

    kind: str
    num_canaries: int
    num_included: int
    confidence: float
    delta: float
    claimed_epsilon: float
    epsilon_one_run: float
    epsilon_gdp: float | None

    @property
    def epsilon_lower(self) -> float:
        """The larger of the bounds."""
        return max(self.epsilon_one_run, self.epsilon_gdp or 0.0)

    @property
    def refutes_claim(self) -> bool:
        """True if the claimed epsilon is too small, at the given confidence."""
        return self.epsilon_lower > self.claimed_epsilon

    def describe(self) -> str:
        """Return the result in one line.

        Example:
            >>> AuditResult(kind="gradient", num_canaries=1000, num_included=512, confidence=0.95, delta=1e-5,
            ...             claimed_epsilon=4.38, epsilon_one_run=0.9, epsilon_gdp=3.2).describe()
            'audited with 1000 gradient canaries: epsilon >= 3.2 at delta 1e-05 with confidence 0.95 (claimed: 4.38)'
        """
        lower = math.floor(self.epsilon_lower * 1e4) / 1e4
        verdict = "; THE CLAIM IS REFUTED" if self.refutes_claim else ""
        return (
            f"audited with {self.num_canaries} {self.kind} canaries: epsilon >= {lower:.5g} at delta {self.delta:g} "
            f"with confidence {self.confidence:g} (claimed: {describe_epsilon(self.claimed_epsilon)}){verdict}"
        )


def audit(
    scores: ArrayLike,
    included: ArrayLike,
    *,
    ledger: Ledger,
    claimed_epsilon: float,
    delta: float,
    kind: str,
    confidence: float = 0.95,
) -> AuditResult:
    """Turn scores and coins of one run into lower bounds on epsilon.

    The one-run bound gets half of the significance. The other half goes to a bound for Gaussian noise:
    ``epsilon_noise_scale`` for "gradient" canaries; ``epsilon_one_run_gdp`` for "input" canaries, which disturb each
    other, if nothing was subsampled. If neither applies, the one-run bound gets all of the significance.

    **Guarantee**: ``epsilon_lower`` exceeds a true claim with probability at most ``1 - confidence``.

    Args:
        scores: shape (m,); a high score means "in".
        included: shape (m,), True where the coin said "in".
        ledger: the releases that the run claims.
        claimed_epsilon: the accountant's epsilon at ``delta``.
        delta: in (0, 1).
        kind: "gradient" or "input".
        confidence: in (0, 1).

    Raises:
        ValueError: numbers or shapes out of range.

    Example:
        >>> from lightning_dp.accounting import Ledger, PrivacyEvent
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.gaussian(noise_multiplier=1.0))
        >>> flips = np.arange(1000) % 2 == 0
        >>> audit(flips - 0.5, flips, ledger=ledger, claimed_epsilon=4.38, delta=1e-5, kind="gradient").refutes_claim
        True
    """
    kind = check.check_choice("kind", kind, ("gradient", "input"))
    gaussian = all(key.sample_rate == 1 and key.noise_multiplier > 0 for key in ledger.mechanisms())
    split = 1 - (1 - check.check_probability("confidence", confidence)) / 2
    gdp: float | None = None
    if kind == "gradient":
        gdp = epsilon_noise_scale(scores, included, ledger=ledger, delta=delta, confidence=split)
    elif gaussian:
        gdp = epsilon_one_run_gdp(scores, included, delta=delta, confidence=split)
    return AuditResult(
        kind=kind,
        num_canaries=int(np.size(np.asarray(scores))),
        num_included=int(np.asarray(included).sum()),
        confidence=confidence,
        delta=delta,
        claimed_epsilon=claimed_epsilon,
        epsilon_one_run=epsilon_one_run(scores, included, delta=delta, confidence=confidence if gdp is None else split),
        epsilon_gdp=gdp,
    )
