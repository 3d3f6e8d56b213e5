"""Observers of a release: clipping bounds that learn from it, and un-noised diagnostics on request."""

from __future__ import annotations

import torch

from lightning_dp.clipping.bounds import Bound, NoisyRelease
from lightning_dp.clipping.contribution import Contribution
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.diagnostics import Diagnostics
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.release import Release
from lightning_dp.step.samples import Samples


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


def observe(
    bound: Bound, diagnostics: Diagnostics, accumulator: Accumulator, samples: Samples, contribution: Contribution
) -> None:
    """Show clipped samples to a bound that learns from their statistics, and to un-noised diagnostics."""
    if bound.num_statistics:
        accumulator.statistics.add_(bound.statistics(torch.linalg.vector_norm(samples.norms, dim=0)))
    if diagnostics.reads_sums:
        diagnostics.add(samples.raw_sum, torch.linalg.vector_norm(samples.norms, dim=0), contribution.norms)
