"""Observers of a release: clipping bounds that learn from it, and un-noised diagnostics on request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dp.clipping.bounds import Bound, NoisyRelease
from lightning_dp.per_sample import GradientEngine
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.diagnostics import Diagnostics
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.release import Release


def learn(
    bound: Bound, accumulator: Accumulator, reduction: Reduction, release: Release, expected_batch_size: int
) -> float:
    """Show a noisy release to a clipping bound that learns from it, which is post-processing.

    Returns:
        The factor on the finished gradient; 1 unless the bound is for study only.
    """
    if not bound.sees_releases:
        return 1.0
    statistics = tuple(accumulator.statistics.tolist())
    squared_norm, num_live = reduction.squared_norm(accumulator)
    bound.observe(
        NoisyRelease(
            squared_norm=squared_norm,
            num_live=num_live,
            noise_std=release.noise_std,
            expected_batch_size=expected_batch_size,
            statistics=statistics,
        )
    )
    return bound.rescale(statistics)


def diagnose(
    diagnostics: Diagnostics,
    engine: GradientEngine,
    accumulator: Accumulator,
    norms_GB: Tensor,
    kept_norms_B: Tensor,
    scaled: Callable[[Tensor], Tensor],
) -> None:
    """Add the raw sum and the norms of a microbatch to the un-noised figures. NOT private."""
    raw = accumulator.gradient.new_zeros(accumulator.num_coordinates)
    ones = norms_GB.isfinite().all(0).to(norms_GB.dtype).repeat(len(accumulator.groups), 1)
    engine.accumulate(scaled(ones), accumulator.groups, accumulator.views_of(raw))
    active = raw if accumulator.active is None else raw[accumulator.active]
    diagnostics.add(active, torch.linalg.vector_norm(norms_GB, dim=0), kept_norms_B)
