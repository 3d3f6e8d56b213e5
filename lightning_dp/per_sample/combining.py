"""Norms and weighted sums of materialized per-sample gradients."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample._torch import add_scaled
from lightning_dp.per_sample.nodes import Region, view_of
from lightning_dp.per_sample.rules.base import accumulation_dtype, masked_squared_norm, squared_norm


def norm_of(grads: Tensor, mask: ParameterMask | None) -> Tensor:
    """Return the squared norm of every sample's gradient, or of its active entries: shape ``(B,)``."""
    return squared_norm(grads) if mask is None else masked_squared_norm(grads, mask.active)


def add_combined(out: Tensor, grads: Tensor, factors: Tensor, dead: Tensor | None) -> None:
    """Add ``sum_i factors[i] grads[i]`` to ``out``; in place, as one matrix-vector product, if dtypes allow."""
    whole = dead is None and out.dtype == grads.dtype and out.is_contiguous() and grads.is_contiguous()
    if whole and out.numel() and grads.shape[0]:
        out.view(-1).addmv_(grads.view(grads.shape[0], -1).mT, factors.to(grads.dtype))
    else:
        out.add_(combine(grads, factors, dead))


def combine(grads: Tensor, factors: Tensor, dead: Tensor | None) -> Tensor:
    """Return ``sum_i factors[i] grads[i]`` without the dropped samples, even if their entries are not finite."""
    if dead is not None:
        grads = grads.masked_fill(dead.reshape(-1, *[1] * (grads.dim() - 1)), 0.0)
    total: Tensor = torch.tensordot(factors.to(grads.dtype), grads, dims=1)
    return total


def zero_gradient(parameter: Tensor, batch_size: int) -> Tensor:
    """Return the per-sample gradients of a parameter that no backprop reached."""
    return torch.zeros(batch_size, *parameter.shape, dtype=accumulation_dtype(parameter), device=parameter.device)


class Joined:
    """Per-sample gradients with few numbers, next to each other in one matrix: a norm and a sum for all of them.

    Args:
        parts: name of a parameter, key of a tensor that is a part of it, region of that part, gradients ``(B, ...)``.
    """

    def __init__(self, parts: Sequence[tuple[str, Hashable, Region | None, Tensor]]) -> None:
        self.grads = torch.cat([grad.reshape(len(grad), grad.shape[1:].numel()) for *_, grad in parts], 1)
        self._parts = [(name, key, region, grad.shape[1:]) for name, key, region, grad in parts]

    def add_weighted_sum(
        self,
        factors: Tensor,
        dead: Tensor | None,
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask],
    ) -> set[tuple[str, Hashable]]:
        """Add ``sum_i factors[i] gradient_i`` to the targets; return the names and keys of the parts that were added.

        Args:
            factors: shape ``(B,)``.
            dead: marks the samples of factor 0; None if there are none.
            out: accumulation targets by name.
            masks: by name; parts of masked parameters are left to the caller.
        """
        total = combine(self.grads, factors, dead)
        done: set[tuple[str, Hashable]] = set()
        targets: list[Tensor] = []
        added: list[Tensor] = []
        sums = torch.split(total, [shape.numel() for *_, shape in self._parts])
        for (name, key, region, shape), part in zip(self._parts, sums, strict=True):
            if name not in masks and (region is None or out[name].is_contiguous()):
                targets.append(view_of(out[name], region))
                added.append(part.view(shape))
                done.add((name, key))
        if targets:
            add_scaled(targets, added, 1.0)
        return done
