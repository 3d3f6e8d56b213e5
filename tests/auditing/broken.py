"""Deliberately broken builds: how each is made out of the sound one, and what catches it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_dp.clipping import FlatClipping
from lightning_dp.noise import GaussianNoise
from lightning_dp.sampling import indices
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.microbatch import Microbatch
from lightning_dp.step.state import PrivacyState
from lightning_dp.step.step import PrivateStep
from lightning_dp.strategies.fit import PrivateFit
from tests.auditing import checks

Check = Callable[[Path], None]


@dataclass(frozen=True)
class Variant:
    """A broken build.

    Args:
        breaks: makes it out of the sound one.
        check: raises AssertionError on it.
        says: what the error must contain (a regular expression).
    """

    breaks: Callable[[pytest.MonkeyPatch], None]
    check: Check
    says: str


def scaled_noise(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    """Noise of ``factor`` times the std that the ledger speaks of."""

    def breaks(patch: pytest.MonkeyPatch) -> None:
        add_, fill_ = GaussianNoise.add_, GaussianNoise.fill_
        patch.setattr(GaussianNoise, "add_", lambda self, tensor, std: add_(self, tensor, std * factor))
        patch.setattr(GaussianNoise, "fill_", lambda self, tensor, std: fill_(self, tensor, std * factor))

    return breaks


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FlatClipping, "_raw_factors", lambda self, norms: torch.ones_like(norms))


def clipping_after_summing(patch: pytest.MonkeyPatch) -> None:
    """The sum of a batch is clipped, not each sample."""
    no_clipping(patch)
    original = Accumulator.payload

    def payload(self: Accumulator) -> tuple[Tensor, Tensor, Tensor]:
        whole, gradient, statistics = original(self)
        gradient *= (self.sensitivity / gradient.norm()).clamp(max=1.0)
        return whole, gradient, statistics

    patch.setattr(Accumulator, "payload", payload)


def divisor_by_realised_batch(patch: pytest.MonkeyPatch) -> None:
    take, write_grads, seen = PrivateFit.take, Accumulator.write_grads, {"samples": 1}

    def noting(self: PrivateFit, batch: Any) -> Any:
        seen["samples"] = max(1, batch.num_samples)
        return take(self, batch)

    def dividing(self: Accumulator, noisy: Tensor, expected_batch_size: int, rescale: float = 1.0) -> None:
        write_grads(self, noisy, seen["samples"], rescale)

    patch.setattr(PrivateFit, "take", noting)
    patch.setattr(Accumulator, "write_grads", dividing)


def mask_redrawn_within_a_batch(patch: pytest.MonkeyPatch) -> None:
    original, counter = Microbatch.__enter__, itertools.count()

    def begin(self: Microbatch) -> Microbatch:
        for sums in self._step.accumulators.values():
            masks = {name: torch.rand(p.shape) < 0.5 for name, p in sums.parameters.items()}
            sums.set_masks([masks], (*sums.mask_version[:1], "redrawn", next(counter)))
        return original(self)

    patch.setattr(Microbatch, "__enter__", begin)


def noise_on_the_first_microbatch_only(patch: pytest.MonkeyPatch) -> None:
    """Each batch's noise is drawn with its first microbatch, where that has a gradient; what comes later has none."""
    collect, add_ = PrivateStep.collect, GaussianNoise.add_

    def collecting(self: PrivateStep, index: int = 0) -> None:
        sums = self.accumulators[index]
        first = not sums.used
        collect(self, index)
        if first:
            std = self.releases[index].noise_std
            sums.gradient.add_(add_(self.noise.source, torch.zeros_like(sums.gradient), std) * (sums.gradient != 0))

    patch.setattr(PrivateStep, "collect", collecting)
    patch.setattr(PrivateStep, "noise_comes_first", lambda self: False)
    patch.setattr(GaussianNoise, "add_", lambda self, tensor, std: tensor)


def same_noise_every_step(patch: pytest.MonkeyPatch) -> None:
    for name in ("add_", "fill_"):
        original = getattr(GaussianNoise, name)
        patch.setattr(GaussianNoise, name, lambda self, *args, of=original: of(GaussianNoise(seed=7), *args))


def correlated_ranks(patch: pytest.MonkeyPatch) -> None:
    """One seed on all ranks."""
    patch.setattr(indices, "_generator", lambda seed, rank, world_size: np.random.default_rng(5))


def ledger_not_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrivacyState, "record", lambda self, sigma: None)


AUDIT, ABOVE = checks.check_the_audit_stays_below_the_claim, "is above the claim"

VARIANTS: dict[str, Variant] = {
    "no_noise": Variant(scaled_noise(0.0), AUDIT, ABOVE),
    "half_the_noise": Variant(scaled_noise(0.5), AUDIT, ABOVE),
    "two_thirds_of_the_noise": Variant(scaled_noise(2 / 3), AUDIT, ABOVE),
    "three_halves_of_the_noise": Variant(
        scaled_noise(3 / 2), checks.check_every_coordinate_carries_its_noise, "times its std"
    ),
    "no_clipping": Variant(no_clipping, AUDIT, ABOVE),
    "clipping_after_summing": Variant(
        clipping_after_summing,
        checks.check_one_record_moves_the_sum_by_at_most_the_bound,
        "one record moves the sum by",
    ),
    "divisor_by_realised_batch": Variant(
        divisor_by_realised_batch, checks.check_the_divisor_is_the_expected_batch_size, "the noisy sum was divided by"
    ),
    "mask_redrawn_within_a_batch": Variant(
        mask_redrawn_within_a_batch,
        checks.check_one_mask_holds_for_a_logical_batch,
        "the mask changed within a logical batch",
    ),
    "noise_on_the_first_microbatch_only": Variant(noise_on_the_first_microbatch_only, AUDIT, ABOVE),
    "noise_once_a_rank": Variant(
        scaled_noise(math.sqrt(2)), checks.check_noise_shares_of_ranks_add_up, r"the noise has 1\.[345].* times its std"
    ),
    "same_noise_every_step": Variant(
        same_noise_every_step, checks.check_noise_is_new_at_every_step, "noise of two steps has correlation 1"
    ),
    "correlated_ranks": Variant(
        correlated_ranks, checks.check_ranks_draw_independently, "two ranks drew the same positions"
    ),
    "ledger_not_written": Variant(
        ledger_not_written, checks.check_every_release_is_in_the_ledger, "the ledger holds 0 of 8 releases"
    ),
}

CHECKS: list[Check] = sorted({variant.check for variant in VARIANTS.values()}, key=lambda check: check.__name__)
