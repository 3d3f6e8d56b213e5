"""Linear layers: ``weight`` of shape (p, d), ``bias`` of shape (p,).

Legend: ``B`` samples, ``T`` positions of a sample (axes between batch and features, calls, rows), ``d`` in, ``p`` out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.per_sample.rules.base import (
    Call,
    Rule,
    accumulation_dtype,
    samples_a_block,
    squared_norm,
    sum_from_zeros,
    weighted_rows,
    widen,
)
from lightning_dp.per_sample.rules.rounding import at_least_tiny, gram_with_rounding, lengths, with_rounding
from lightning_dp.per_sample.rules.sparse_mask import masked_outer_squared_norm, masked_outer_sum

_LARGE = 1e6
"""Squared norms above this make squares that have vanished in the other factor count."""

_HUGE = 1e30
"""Squared norms above this make them count so much that no norm under a mask can be told."""

_COST_OF_KEEPING = 20
"""Multiplications in the time that one number of a kept gradient costs (measured on a CPU)."""

_GRAM_BLOCK = 128
"""Positions of a block of Gram matrices, of which those above the diagonal are left out: they are symmetric."""


def prefer_gram(num_positions: int, num_in: int, num_out: int) -> bool:
    """Tell whether the Gram matrices of the positions cost less than the per-sample gradients.

    Multiplications a sample: ``T^2 (d + p)`` against ``T d p``.
    """
    return num_positions * (num_in + num_out) <= num_in * num_out


def prefer_kept(num_positions: int, num_in: int, num_out: int) -> bool:
    """Tell whether making the per-sample gradients once costs less than Gram matrices and a weighted product.

    Multiplications a sample: ``T^2 (d + p)`` are saved; what has to be written and read twice, ``d p`` numbers, costs
    as much time as ``_COST_OF_KEEPING d p`` multiplications.
    """
    return num_positions**2 * (num_in + num_out) > _COST_OF_KEEPING * num_in * num_out


def gram_squared_norm(inputs_BTd: Tensor, backprops_BTp: Tensor) -> Tensor:
    """Return ``|sum_t g_t a_t^T|^2 = sum_{s,t} (a_s . a_t)(g_s . g_t)`` for every sample, shape ``(B,)``.

    **Guarantee**: the rounding of this sum, and that of the weighted sum, are added: a norm is never below what is added.
    """
    size, positions = inputs_BTd.shape[:2]
    total = inputs_BTd.new_zeros(size)
    squares: tuple[list[Tensor], list[Tensor]] = ([], [])
    for low in range(0, positions, _GRAM_BLOCK):
        high = min(low + _GRAM_BLOCK, positions)
        gram_a = torch.bmm(inputs_BTd[:, low:high], inputs_BTd[:, low:].mT)
        gram_g = torch.bmm(backprops_BTp[:, low:high], backprops_BTp[:, low:].mT)
        for gram, found in zip((gram_a, gram_g), squares, strict=True):
            found.append(gram.diagonal(dim1=1, dim2=2).clone())
        gram_a[:, :, : high - low].mul_(0.5)  # the block on the diagonal is symmetric, the others are met once
        total += 2 * torch.linalg.vecdot(gram_a.flatten(1), gram_g.flatten(1))
    widths = (inputs_BTd.shape[2], backprops_BTp.shape[2])
    sides = (at_least_tiny(torch.cat(found, 1).sqrt(), width) for found, width in zip(squares, widths, strict=True))
    return gram_with_rounding(total, *sides)


def outer_squared_norm(inputs_Bd: Tensor, backprops_Bp: Tensor) -> Tensor:
    """Return ``|g a^T|^2 = |a|^2 |g|^2`` for every sample, shape ``(B,)``."""
    norm_a = torch.linalg.vector_norm(inputs_Bd, dim=1).square()
    norm_g = torch.linalg.vector_norm(backprops_Bp, dim=1).square()
    norm_a, norm_g = _no_underflow(norm_a, norm_g, inputs_Bd.shape[1], backprops_Bp.shape[1])
    return norm_a * norm_g


def _no_underflow(norm_a: Tensor, norm_g: Tensor, num_in: int, num_out: int) -> tuple[Tensor, Tensor]:
    """Count squares too small for the type as the smallest where the other factor is huge: the product may matter."""
    tiny = torch.finfo(norm_a.dtype).tiny
    return (
        torch.where(norm_g > _LARGE, norm_a.clamp_min(tiny * num_in), norm_a),
        torch.where(norm_a > _LARGE, norm_g.clamp_min(tiny * num_out), norm_g),
    )


class LinearRule(Rule):
    """``nn.Linear``, at any number of positions, calls and rows of a sample."""

    fills_buffers = True

    @override
    def follows(self, spec: Any, axis: int, num_axes: int) -> bool:
        return axis < num_axes - 1

    @override
    def per_sample(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        grads: dict[str, Tensor] = {}
        if "weight" in names:
            activation, backprop = calls[0].activation, calls[0].backprop
            new = partial(torch.empty, dtype=accumulation_dtype(backprop), device=backprop.device)
            shape = (backprop.shape[-1], activation.shape[-1])
            grads["weight"] = new(batch_size, *shape)
            self.fill(module, calls, batch_size, "weight", grads["weight"])
        if "bias" in names:
            grads["bias"] = _sums_over_positions(calls, batch_size)
        return grads

    @override
    def squared_norms(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        norms: dict[str, Tensor] = {}
        if "weight" in names:
            blocks = _blocks(calls, batch_size)
            norms["weight"] = torch.cat([_weight_squared_norm(inputs, backprops) for _, inputs, backprops in blocks])
        if "bias" in names:
            norms["bias"] = squared_norm(_sums_over_positions(calls, batch_size))
        return norms

    @override
    def masked_squared_norms(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, masks: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        norms: dict[str, Tensor] = {}
        if "weight" in masks:
            blocks, mask = _blocks(calls, batch_size), masks["weight"]
            if len(calls) > 1:  # several blocks, and several positions: a product with the mask's numbers in each
                mask = mask.to(accumulation_dtype(calls[0].backprop))
            norms["weight"] = torch.cat([self._masked_weight_squared_norm(a, g, mask) for _, a, g in blocks])
        if "bias" in masks:
            norms["bias"] = squared_norm(_sums_over_positions(calls, batch_size) * masks["bias"])
        return norms

    def _masked_weight_squared_norm(self, inputs: Tensor, backprops: Tensor, mask: Tensor) -> Tensor:
        lefts, rights = backprops, inputs
        if inputs.shape[1] != 1:
            return _product_squared_norm(lefts, rights, mask)
        lefts, rights = lefts[:, 0], rights[:, 0]
        norm = masked_outer_squared_norm(mask, lefts, rights)
        # squares that have vanished count beside large ones: the most that they can be is added, and next to a huge one the
        # sample counts as not finite, as one with NaN does
        squares, tiny = (squared_norm(lefts), squared_norm(rights)), torch.finfo(norm.dtype).tiny
        for square, other in zip(squares, (rights, lefts), strict=True):
            norm = norm + torch.where(square > _LARGE, square * tiny * other.shape[1], 0.0)
        return torch.where(torch.maximum(*squares) <= _HUGE, norm, torch.inf)

    @override
    def weighted_sum(
        self, module: nn.Module, calls: Sequence[Call], factors: Tensor, batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        return sum_from_zeros(self, module, calls, factors, batch_size, names)

    @override
    def add_weighted_sum(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        factors: Tensor,
        batch_size: int,
        out: Mapping[str, Tensor],
    ) -> None:
        if "bias" in out:  # from the sums that its norms are taken from
            out["bias"].add_(weighted_rows(_sums_over_positions(calls, batch_size), factors))
        if "weight" not in out:
            return
        for call in calls:  # one by one: nothing of the size of all of them together is made
            inputs, backprops = (widen(_split(tensor, batch_size)) for tensor in (call.activation, call.backprop))
            factors_B11 = factors.to(backprops.dtype).reshape(-1, 1, 1)
            if inputs.shape[2] < backprops.shape[2]:  # the smaller of the two is scaled
                inputs = inputs * factors_B11
            else:
                backprops = backprops * factors_B11
            left, right = (side.flatten(0, 1) for side in (backprops, inputs))
            if out["weight"].dtype == left.dtype:
                out["weight"].addmm_(left.mT, right)
            else:
                out["weight"].add_(left.mT @ right)

    @override
    def picks(self, calls: Sequence[Call], batch_size: int, name: str) -> bool:
        return name == "weight" and _num_positions(calls, batch_size) > 1

    @override
    def live_entries(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str, places: Tensor
    ) -> Tensor:
        if name != "weight":
            return super().live_entries(module, calls, batch_size, name, places)
        found = []
        for _, inputs, backprops in _blocks(calls, batch_size):
            lefts, rights = backprops, inputs
            found += [part.flatten(1).index_select(1, places) for _, part in _products(lefts, rights)]
        return torch.cat(found) if found else widen(calls[0].backprop).new_zeros(0, len(places))

    @override
    def add_live_entries(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        factors: Tensor,
        batch_size: int,
        out: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> set[str]:
        if "weight" not in out or len(calls) > 1:
            return set()
        ((_, inputs, backprops),) = _blocks(calls, batch_size)
        if inputs.shape[1] != 1:
            return set()
        lefts, rights = backprops, inputs
        entries = masked_outer_sum(masks["weight"], lefts[:, 0], rights[:, 0], factors)
        if entries is None:
            return set()
        out["weight"].add_(entries)
        return {"weight"}

    @override
    def fill(self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str, out: Tensor) -> None:
        if name != "weight":
            super().fill(module, calls, batch_size, name, out)
            return
        for rows, inputs, backprops in _blocks(calls, batch_size):
            torch.bmm(backprops.mT, inputs, out=out[rows])

    @override
    def materialises(self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str) -> bool:
        if not batch_size or name != "weight":
            return False
        num_positions = _num_positions(calls, batch_size)
        if num_positions == len(calls):  # one position a call: a single one, or a recurrence, whose calls are all small
            return False
        return prefer_kept(num_positions, calls[0].activation.shape[-1], calls[0].backprop.shape[-1])


def _weight_squared_norm(inputs_BTd: Tensor, backprops_BTp: Tensor) -> Tensor:
    """Return ``|sum_t g_t a_t^T|^2`` for every sample, shape ``(B,)``, by the product that costs least."""
    if inputs_BTd.shape[1] == 1:
        return outer_squared_norm(inputs_BTd[:, 0], backprops_BTp[:, 0])
    if prefer_gram(inputs_BTd.shape[1], inputs_BTd.shape[2], backprops_BTp.shape[2]):
        return gram_squared_norm(inputs_BTd, backprops_BTp)
    return _product_squared_norm(backprops_BTp, inputs_BTd)


def _product_squared_norm(lefts_BTp: Tensor, rights_BTd: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``|mask * sum_t left_t right_t^T|^2`` for every sample, with the rounding of the weighted sum."""
    weights = None if mask is None else mask.to(lefts_BTp.dtype)
    norms = lefts_BTp.new_empty(lefts_BTp.shape[0])
    for rows, part in _products(lefts_BTp, rights_BTd):
        if weights is not None:
            part.mul_(weights)
        norms[rows] = squared_norm(part)
    return with_rounding(norms, torch.linalg.vecdot(lengths(lefts_BTp), lengths(rights_BTd)), lefts_BTp.shape[1])


def _products(lefts_BTp: Tensor, rights_BTd: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield samples with their ``sum_t left_t right_t^T``, in one small buffer that is used again."""
    size, num_left, num_right = lefts_BTp.shape[0], lefts_BTp.shape[2], rights_BTd.shape[2]
    step = samples_a_block(size, num_left * num_right, lefts_BTp.device)
    product = lefts_BTp.new_empty(step, num_left, num_right)
    for low in range(0, size, step):
        rows = slice(low, min(low + step, size))
        part = product[: rows.stop - low]
        torch.bmm(lefts_BTp[rows].mT, rights_BTd[rows], out=part)
        yield rows, part


def _blocks(calls: Sequence[Call], batch_size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield samples with their inputs ``(b, T, d)`` and backprops ``(b, T, p)`` of all calls, in the accumulation type.

    Several calls are copied together a few samples at a time, so that no copy of all of them is ever made. The copies lie
    where those of the last block lay.
    """
    inputs = [_split(call.activation, batch_size) for call in calls]
    backprops = [_split(call.backprop, batch_size) for call in calls]
    if len(calls) == 1:
        yield slice(None), widen(inputs[0]), widen(backprops[0])
        return
    num_positions = sum(tensor.shape[1] for tensor in backprops)
    widths = (inputs[0].shape[2], backprops[0].shape[2])
    step = samples_a_block(batch_size, num_positions * sum(widths), backprops[0].device)
    new = partial(torch.empty, dtype=accumulation_dtype(backprops[0]), device=backprops[0].device)
    joined = [new(step, num_positions, width) for width in widths]
    for low in range(0, max(1, batch_size), step):
        rows = slice(low, min(low + step, batch_size))
        parts = [buffer[: rows.stop - low] for buffer in joined]
        for side, part in zip((inputs, backprops), parts, strict=True):
            torch.cat([tensor[rows] for tensor in side], dim=1, out=part)
        yield rows, parts[0], parts[1]


def _sums_over_positions(calls: Sequence[Call], batch_size: int) -> Tensor:
    """Return the backprops of every sample added over positions and calls, shape ``(B, p)``, in the accumulation type."""
    sums: Tensor | None = None
    for backprop in (widen(_split(call.backprop, batch_size)) for call in calls):
        added = backprop[:, 0] if backprop.shape[1] == 1 else backprop.sum(1)
        sums = added if sums is None else sums + added
    assert sums is not None
    return sums


def _num_positions(calls: Sequence[Call], batch_size: int) -> int:
    """T, over all calls; 0 for an empty batch."""
    return sum(call.activation[..., 0].numel() for call in calls) // max(1, batch_size)


def _split(tensor: Tensor, batch_size: int) -> Tensor:
    if batch_size == 0:
        return tensor.new_zeros(0, 1, tensor.shape[-1])
    return tensor.reshape(batch_size, -1, tensor.shape[-1])
