"""Releases of noise alone, as ranks draw and add them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dp.accounting import PrivacyEvent
from lightning_dp.noise import GaussianNoise
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.noising import ReleaseNoise
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.release import Release


def releases_of(accumulator: Accumulator, reduction: Reduction, *, statistics_std: float = 0.0) -> Tensor:
    """What this rank holds of 600 releases of noise of std 1.5; half of them begin with the noise."""
    noise = ReleaseNoise(GaussianNoise(), reduction)
    event = PrivacyEvent(kind="poisson", noise_multiplier=1.5, sample_rate=0.5)
    release = Release(
        sigma=1.5, noise_std=1.5, drawn_std=1.5, statistics_std=statistics_std, sensitivity=1.0, event=event
    )
    found = []
    for number in range(600):
        noise.begin(accumulator, release, first=number % 2 == 0, divisor=1)
        accumulator.used = True
        noise.add(accumulator, release)
        reduction.reduce(accumulator)
        found.append(accumulator.flat.clone())
        accumulator.reset()
    return torch.stack(found)
