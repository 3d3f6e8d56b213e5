"""Norms and weighted sums of materialized per-sample gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample._torch import real_view
from lightning_dp.per_sample.rules.base import accumulation_dtype, masked_squared_norm, squared_norm

MOST_JOINED = 2**13
"""Numbers of a tensor's per-sample gradients up to which a copy costs less than norms and sums by themselves."""


def is_joined(grads: Tensor, mask: ParameterMask | None) -> bool:
    """Tell whether gradients have so few numbers that norms and sums are computed of all such gradients together."""
    return mask is None and grads.numel() <= MOST_JOINED and grads.is_floating_point()


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
    rows = grads if grads.dim() == 2 else grads.reshape(len(grads), grads.shape[1:].numel())
    total = torch.mv(rows.mT, factors.to(grads.dtype))
    return total if rows is grads else total.view(grads.shape[1:])


def zero_gradient(parameter: Tensor, batch_size: int) -> Tensor:
    """Return the per-sample gradients of a parameter that no backprop reached."""
    shape = real_view(parameter.detach()).shape
    return torch.zeros(batch_size, *shape, dtype=accumulation_dtype(parameter), device=parameter.device)
