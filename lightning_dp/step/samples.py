"""Samples: the per-sample gradients of one microbatch, in the form that a clipping reads."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lightning_dp.clipping.base import SMALLEST_FACTOR
from lightning_dp.per_sample._torch import number_in
from lightning_dp.per_sample.base import SampleGradients
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.reduction import Reduction


class Samples:
    """The gradients of the samples of a microbatch, with respect to the parameters of one accumulator.

    Norms and gradients are computed when they are first read: a clipping by factors needs no per-sample gradient.

    Args:
        gradients: of the samples.
        accumulator: sum of one private optimizer.
        scale: factor from each of these gradients to that of the sample's own loss; one, or shape (B,) in float64.
        reduction: computes norms and sums, also if ranks hold parts of them.
    """

    def __init__(
        self, gradients: SampleGradients, accumulator: Accumulator, scale: float | Tensor, reduction: Reduction
    ) -> None:
        self._gradients, self._accumulator, self._scale, self._reduction = gradients, accumulator, scale, reduction

    @cached_property
    def norms(self) -> Tensor:
        """L2 norms of the active coordinates per group and sample, shape (G, B). Private."""
        accumulator = self._accumulator
        squared = self._reduction.squared_norms(self._gradients, accumulator.groups, accumulator.masks_of_norms)
        return self._scaled(squared.sqrt())

    @property
    def gradients(self) -> Tensor:
        """Per-sample gradients over all coordinates, shape (B, P). Private."""
        grads = self._gradients.per_sample_gradients(self._accumulator.names)
        return self._scaled(torch.cat([grad.flatten(1) for grad in grads.values()], 1).mT).mT

    @property
    def raw_sum(self) -> Tensor:
        """Sum of the gradients that are finite, before clipping, over the active coordinates, shape (L,). Private."""
        accumulator = self._accumulator
        raw = accumulator.gradient.new_zeros(accumulator.num_coordinates)
        ones = self.norms.isfinite().all(0).to(self.norms.dtype).repeat(len(accumulator.groups), 1)
        self._gradients.accumulate(self._scaled(ones), accumulator.groups, accumulator.views_of(raw))
        return raw if accumulator.active is None else raw[accumulator.active]

    @property
    def active(self) -> Tensor | None:
        """Mask of the active coordinates, booleans of shape (P,), public; None if all are active."""
        return self._accumulator.active

    def _scaled(self, values: Tensor, divisor: int = 1) -> Tensor:
        factor = self._scale / divisor
        if isinstance(factor, Tensor):
            factor = factor.to(values.dtype).to(values.device)
        return values * factor

    def add_weighted(self, factors_GB: Tensor) -> None:
        """Add the sum of ``factor * gradient`` over the samples to the accumulator."""
        accumulator = self._accumulator
        weights = self._scaled(factors_GB, accumulator.divisor)
        if not (weights.numel() and number_in(weights.min()) >= SMALLEST_FACTOR):
            weights = torch.where(weights >= SMALLEST_FACTOR, weights, 0.0)
        if self._reduction.is_sharded:
            _ = self.norms  # every rank communicates for them, whether they are read or not
        self._reduction.accumulate(self._gradients, weights, accumulator)

    def add_sum(self, total_P: Tensor) -> None:
        """Add an explicit sum of contributions to the accumulator."""
        self._accumulator.add(total_P)
