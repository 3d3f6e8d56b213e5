"""Clipper: clips the samples of a logical batch and adds them to the sum of their optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
        self._waiting: list[tuple[float, Any]] = []  # samples: scale and gradient

    def begin(self) -> None:
        """Begin a logical batch without samples that wait."""
        self._waiting.clear()

    def add(self, recording: Microbatch, accumulator: Accumulator) -> None:
        """Clip the samples of a microbatch and add them to a sum, or let one that is small wait."""
        step, engine = self._step, self._step.engine
        if not step.automatic or step.reduction.is_sharded or not engine.most_kept:
            self._add(engine, accumulator, recording.scale)
            return
        self._waiting.append((float(recording.scale), engine.take()))
        if len(self._waiting) >= engine.most_kept:
            self.finish(accumulator)

    def finish(self, accumulator: Accumulator) -> None:
        """Clip the samples that wait and add them to a sum."""
        if self._waiting:
            scales, samples = zip(*self._waiting, strict=True)
            self._waiting.clear()
            self._add(self._step.engine.taken(samples), accumulator, torch.tensor(scales, dtype=torch.float64))

    def _add(self, gradients: SampleGradients, accumulator: Accumulator, scale: float | Tensor) -> None:
        step = self._step
        samples = Samples(gradients, accumulator, scale, step.reduction)
        contribution = accumulator.clipping.contribution(samples)  # factors or explicit vectors: one call, no branch
        contribution.add()
        observe(step.bound, step.mechanisms.diagnostics, accumulator, samples, contribution)
