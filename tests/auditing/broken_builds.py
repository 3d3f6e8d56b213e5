"""Deliberately broken builds of the package: each function patches one part of it."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_dp.accounting import PLDAccountant, gaussian_epsilon
from lightning_dp.clipping import FlatClipping
from lightning_dp.noise import GaussianNoise
from lightning_dp.per_sample.engine import PerSampleEngine
from lightning_dp.sampling import LogicalBatch, indices
from lightning_dp.sampling.batches import MicrobatchCollate
from lightning_dp.sampling.indices import CyclicBatchSampler
from lightning_dp.sandbox.randomness import RandomStreams
from lightning_dp.sandbox.sandbox import StepGuard
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.microbatch import Microbatch
from lightning_dp.step.state import PrivacyState
from lightning_dp.step.step import PrivateStep
from lightning_dp.strategies.fit import PrivateFit
from lightning_dp.strategies.hooks import UserHooks
from lightning_dp.strategies.outcomes import TrialFigures
from lightning_dp.trials import couplings, in_batches, real_losses, state_runs
from lightning_dp.trials.couplings import Couplings
from lightning_dp.trials.draws import Draws
from lightning_dp.trials.records import TrainingRecords
from lightning_dp.trials.runs import TrialRuns


def scaled_noise(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    """Noise of ``factor`` times the std that the ledger states."""

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
    collect = PrivateStep.collect

    def clipping(self: PrivateStep, optimizer: int = 0) -> None:
        sums = self.accumulators[optimizer]
        before = sums.gradient.clone()
        collect(self, optimizer)
        added = sums.gradient - before
        added *= (sums.sensitivity / (sums.divisor * added.norm())).clamp(max=1.0)
        sums.gradient.copy_(before + added)

    patch.setattr(PrivateStep, "collect", clipping)


def user_split_over_microbatches(patch: pytest.MonkeyPatch) -> None:
    """Microbatches are full: the records of one user may be in several, and are clipped in each."""
    collate = MicrobatchCollate.__call__

    def splitting(
        self: MicrobatchCollate, samples: list[Any], sizes: list[int] | None = None, **options: Any
    ) -> LogicalBatch:
        most = self.microbatch_size or len(samples)
        cut = [min(most, size - start) for size in sizes or () for start in range(0, size, most)]
        return collate(self, samples, cut if sizes else None, **options)

    patch.setattr(MicrobatchCollate, "__call__", splitting)


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


def reshuffled_order(patch: pytest.MonkeyPatch) -> None:
    """Records are dealt to batches again in every pass, while noise counts on the same order."""
    iterate = CyclicBatchSampler.__iter__

    def again(self: CyclicBatchSampler) -> Any:
        self._groups = list(indices._bins(self._rng, self.steps_per_epoch, self.num_own))
        return iterate(self)

    patch.setattr(CyclicBatchSampler, "__iter__", again)


def allocation_by_the_closed_form(patch: pytest.MonkeyPatch) -> None:
    """The published closed form for one pass, with the Gaussian alone composed over passes."""

    def epsilon_of(self: PLDAccountant, mechanisms: Any, neighboring_relation: str, delta: float) -> float:
        ((_, sigma, num_batches), passes), *_ = mechanisms.items()
        mu = math.sqrt(passes / num_batches) / sigma
        return gaussian_epsilon(mu, delta) + (1 - 1 / num_batches) / (2 * sigma**2)

    patch.setattr(PLDAccountant, "epsilon_of", epsilon_of)


def ledger_not_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrivacyState, "record", lambda self, sigma: None)


def norms_without_rounding(patch: pytest.MonkeyPatch) -> None:
    """A norm is the product's own, without what rounding may hide."""
    plain = {
        "with_rounding": lambda squared, total, num_terms, **_: squared,
        "gram_with_rounding": lambda products, inputs, backprops: products.clamp_min(0.0),
    }
    for module in [m for name, m in sys.modules.items() if name.startswith("lightning_dp.per_sample.")]:
        for name, function in plain.items():
            patch.setattr(module, name, function, raising=False)


def optimizers_unguarded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepGuard, "_check", lambda self, optimizer, args, kwargs: None)


def microbatches_with_effect(patch: pytest.MonkeyPatch) -> None:
    """What user code leaves behind in a further microbatch stays; trials, whose weights would stay too, move none."""
    patch.setattr(Snapshot, "put_back", lambda self, **_: None)
    patch.setattr(Draws, "move", lambda self, parameters: None)


def state_unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(state_runs, "check_state", lambda *_: None)


def hooks_not_run(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UserHooks, "call", lambda self, name, *args: [])


def steps_not_rehearsed(patch: pytest.MonkeyPatch) -> None:
    """Trials end where an optimizer would step."""
    run = TrialRuns.run
    patch.setattr(TrialRuns, "run", lambda self, *args, rehearses=False, **kwargs: run(self, *args, **kwargs))


def items_read_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TrainingRecords, "check_reading", lambda self, seed: None)


def checkpoints_unread(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UserHooks, "saved", lambda self: {})


def figures_unread(patch: pytest.MonkeyPatch) -> None:
    """What a trial logs cannot be read back."""
    patch.setattr(TrialFigures, "log", lambda self, names, figure: None)


def coins_in_the_middle(patch: pytest.MonkeyPatch) -> None:
    """Low and high coins are the middle one."""
    patch.setattr(couplings, "LOW", couplings.MIDDLE)
    patch.setattr(couplings, "HIGH", couplings.MIDDLE)
    patch.setattr(in_batches, "HIGH", couplings.MIDDLE)


def small_batches_on_trial(patch: pytest.MonkeyPatch) -> None:
    """No check of couplings ever sees a batch of the real size."""
    patch.setattr(Couplings, "exchange_one", lambda self, snapshot, records, **_: None)
    patch.setattr(real_losses, "check_in_batch", lambda *_, **__: None)


def no_record_out_of_range(patch: pytest.MonkeyPatch) -> None:
    """Trials never exchange a record while another one is out of range."""
    patch.setattr(Couplings, "_exchange_beside_incomplete", lambda self, *_: None)


def norms_of_another_draw(patch: pytest.MonkeyPatch) -> None:
    """The norm is taken in a run of its own, in which another layer may be left out."""
    norms = PerSampleEngine.squared_norms

    def of_a_draw(self: PerSampleEngine, *args: Any, **kwargs: Any) -> Tensor:
        return norms(self, *args, **kwargs) * float(np.random.default_rng().choice([1.0, 1e-6]))

    patch.setattr(PerSampleEngine, "squared_norms", of_a_draw)


def streams_go_on(patch: pytest.MonkeyPatch) -> None:
    """Random generators go on from the user's seed, batch after batch."""
    patch.setattr(RandomStreams, "begin", lambda self: None)
