"""Clipper: clips the samples of a logical batch and adds them to the sum of their optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dp.per_sample.base import SampleGradients
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.microbatch import Microbatch
from lightning_dp.step.observers import observe
from lightning_dp.step.samples import Samples

if TYPE_CHECKING:
    from lightning_dp.step.step import PrivateStep


class Clipper:
    """Clips microbatches at once; small samples that run one at a time, several together, which saves most calls.

    **Guarantee**: after :meth:`finish` every sample given since :meth:`begin` is in the sum exactly once, clipped.

    Args:
        step: the private step.
    """

    def __init__(self, step: PrivateStep) -> None:
        self._step = step
        self._scales: list[float] = []  # of the samples that the engine keeps

    def begin(self) -> None:
        """Begin a logical batch without samples that wait."""
        self._scales.clear()

    def add(self, recording: Microbatch, accumulator: Accumulator) -> None:
        """Clip the samples of a microbatch and add them to a sum, or let the engine keep them until later."""
        step, engine = self._step, self._step.engine
        if not step.automatic or step.reduction.is_sharded or engine.most_kept <= len(self._scales):
            self._add(engine, accumulator, recording.scale)
            return
        engine.keep(len(self._scales))
        self._scales.append(float(recording.scale))
        if len(self._scales) == engine.most_kept:
            self.finish(accumulator)

    def finish(self, accumulator: Accumulator) -> None:
        """Clip the samples that wait and add them to a sum."""
        if self._scales:
            kept = self._step.engine.kept(len(self._scales))
            self._add(kept, accumulator, torch.tensor(self._scales, dtype=torch.float64))
            self._scales.clear()

    def _add(self, gradients: SampleGradients, accumulator: Accumulator, scale: float | Tensor) -> None:
        step = self._step
        samples = Samples(gradients, accumulator, scale, step.reduction)
        contribution = accumulator.clipping.contribution(samples)  # factors or explicit vectors: one call, no branch
        contribution.add()
        observe(step.bound, step.mechanisms.diagnostics, accumulator, samples, contribution)
