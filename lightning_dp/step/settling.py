"""Bound, masks and releases of a logical step, computed from public state before its first sample is seen."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_dp.clipping import NoClipping
from lightning_dp.clipping.bounds import Bound
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.correlation import check_mask_may_change
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.plan import DPPlan
from lightning_dp.step.release import Release, plan_release


def settle(
    accumulators: Mapping[int, Accumulator], mechanisms: Mechanisms, plan: DPPlan, step: int, since: int
) -> tuple[Bound, dict[int, Release]]:
    """Set clipping and masks of all accumulators for a logical step; return its clipping bound and its releases.

    **Guarantee**: everything is a function of public state alone, and stays the same until the next logical step
    begins.
    """
    plain = not plan.is_private(step)
    bound = Bound() if plain else mechanisms.bound
    for accumulator in accumulators.values():
        base = NoClipping() if plain else accumulator.base
        accumulator.clipping = bound.clipping(base, step, len(accumulator.groups))
    _set_masks(accumulators, mechanisms, step, since)
    releases = {
        index: plan_release(
            plan,
            step,
            clipping=accumulator.clipping,
            sizes=accumulator.group_sizes,
            bound=bound,
            num_releases=len(accumulators),
            since=since,
        )
        for index, accumulator in accumulators.items()
    }
    return bound, releases


def _set_masks(accumulators: Mapping[int, Accumulator], mechanisms: Mechanisms, step: int, since: int) -> None:
    version = tuple(mask.version(step) for mask in mechanisms.masks)
    if all(accumulator.mask_version == version for accumulator in accumulators.values()):
        return
    check_mask_may_change(since)
    parameters = {name: p for acc in accumulators.values() for name, p in acc.parameters.items()}
    masks = [mask.live(step, parameters) for mask in mechanisms.masks]
    for accumulator in accumulators.values():
        accumulator.set_masks(masks, version)


def noise_stds(
    releases: Mapping[int, Release], accumulators: Mapping[int, Accumulator], expected_batch_size: int
) -> dict[str, float]:
    """Return the noise std per coordinate of the noisy mean, by parameter name. Public."""
    return {
        name: release.std_of_group(number) / expected_batch_size
        for index, release in releases.items()
        for number, group in enumerate(accumulators[index].groups)
        for name in group
    }
