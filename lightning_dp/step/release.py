"""Release: noise and ledger entry of one release, computed once from public state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dp.accounting import PrivacyEvent
from lightning_dp.clipping import Clipping
from lightning_dp.clipping.bounds import Bound
from lightning_dp.step.plan import DPPlan


@dataclass(frozen=True)
class Release:
    """Noise of one release of a logical batch; the same object is used for drawing, recording and checking.

        drawn_std = z_g F S sens,     statistics_std = s_b F,     F = 2 under "replace_one", else 1
        noise_std = drawn_std; times sqrt(sum_j r_j^2) if noise is correlated between steps

    with ``S`` the sensitivity of the clipped sum, and ``z_g``, ``s_b`` the shares of the noise multiplier ``sigma``
    that the clipping bound gives to the gradient and to its statistics (``z_g = sigma`` without statistics). ``sens``
    is the sensitivity of correlated noise; it is 1 for independent noise.

    **Guarantee**: every field is a function of public state, computed before the first sample of the batch is read.

    Args:
        sigma: noise multiplier of this release.
        noise_std: standard deviation of the noise on one coordinate of the sum, over all ranks; the root mean square
            over coordinates where groups carry noise of their own.
        drawn_std: standard deviation of the fresh noise of this step, before the factors in ``shares``; differs from
            ``noise_std`` if noise is correlated or shared out between groups.
        statistics_std: standard deviation of the noise on one statistic, over all ranks.
        sensitivity: S, the largest norm that one sample may add to the sum.
        shares: factor of each group on ``drawn_std``; empty if the std is the same on all coordinates.
        event: ledger entry of the logical step once all its planned releases are made.
    """

    sigma: float
    noise_std: float
    drawn_std: float
    statistics_std: float
    sensitivity: float
    event: PrivacyEvent
    shares: tuple[float, ...] = ()

    def std_of_group(self, group: int) -> float:
        """Return the noise std per coordinate in a group of parameters, over all ranks."""
        return self.drawn_std * self.shares[group] if self.shares else self.noise_std


def plan_release(
    plan: DPPlan,
    step: int,
    *,
    clipping: Clipping,
    sizes: Sequence[int],
    bound: Bound,
    num_releases: int,
    since: int = 0,
) -> Release:
    """Return the release of one private optimizer in a logical step.

    Args:
        plan: the public settings of the run.
        step: the logical step.
        clipping: clipping of this step.
        sizes: number of active coordinates of each group of parameters.
        bound: clipping bound of this step, which may need a share of the noise for its statistics.
        num_releases: number m of private optimizers; each gets noise of multiplier ``sigma_t sqrt(m)``, so that all
            together cost one event.
        since: steps before this one in the history of correlated noise.
    """
    sigma = plan.sigma(step) * num_releases**0.5
    gradient_sigma, statistics_std = bound.share_noise(sigma, plan.expected_batch_size)
    factor, correlation, sensitivity = plan.relation_factor, plan.correlation, clipping.sensitivity(len(sizes))
    drawn_std = noise_std = gradient_sigma * factor * sensitivity
    if correlation is not None:
        drawn_std *= correlation.sensitivity
        noise_std = drawn_std * correlation.noise.std_factor(since)
    shares = clipping.noise_shares(sizes)
    if shares and sum(sizes):
        energy = sum(size * share**2 for size, share in zip(sizes, shares, strict=True))
        noise_std = drawn_std * math.sqrt(energy / sum(sizes))
    return Release(sigma, noise_std, drawn_std, statistics_std * factor, sensitivity, plan.event(step), shares)
