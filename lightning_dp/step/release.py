"""Release: the noise of one release, computed once from public state."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dp.accounting import PrivacyEvent
from lightning_dp.clipping.bounds import Bound
from lightning_dp.step.plan import DPPlan


@dataclass(frozen=True)
class Release:
    """Noise of one release of a logical batch; the same object is used to draw, to record and to check.

        noise_std = z_g F S,     statistics_std = s_b F,     F = 2 under "replace_one", else 1

    with ``S`` the sensitivity of the clipped sum, and ``z_g``, ``s_b`` the shares of the noise multiplier ``sigma`` that the
    clipping bound gives to the gradient and to its statistics (``z_g = sigma`` without statistics).

    **Guarantee**: every field is a function of public state, settled before the first sample of the batch is looked at.

    Args:
        sigma: noise multiplier of this release.
        noise_std: standard deviation of the noise on one coordinate of the sum, over all ranks.
        statistics_std: standard deviation of the noise on one statistic, over all ranks.
        sensitivity: S, the largest norm that one sample may add to the sum.
        event: what the ledger holds of the logical step once all its planned releases are made.
    """

    sigma: float
    noise_std: float
    statistics_std: float
    sensitivity: float
    event: PrivacyEvent


def plan_release(plan: DPPlan, step: int, *, sensitivity: float, bound: Bound, num_releases: int) -> Release:
    """Return the release of one private optimizer in a logical step.

    Args:
        plan: the public settings of the run.
        step: the logical step.
        sensitivity: S, the largest norm that one sample adds to the sum.
        bound: clipping bound in force, which may need a share of the noise for its statistics.
        num_releases: m, private optimizers; each gets noise of multiplier ``sigma_t sqrt(m)``, so that all cost one event.
    """
    sigma = plan.sigma(step) * num_releases**0.5
    gradient_sigma, statistics_std = bound.share_noise(sigma, plan.expected_batch_size)
    factor = plan.relation_factor
    return Release(sigma, gradient_sigma * factor * sensitivity, statistics_std * factor, sensitivity, plan.event(step))
