"""The rule for linear layers with ``weight`` of shape (p, d) and ``bias`` of shape (p,).

Legend: ``B`` samples, ``T`` positions of a sample (axes between batch and features, calls, rows), ``d`` in, ``p`` out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample.rules.base import (
    Call,
    Rule,
    accumulation_dtype,
    samples_a_block,
    squared_norm,
    weighted_rows,
    widen,
)
from lightning_dp.per_sample.rules.outer_products import (
    masked_outer_squared_norm,
    masked_outer_sum,
    prefer_gram,
    product_squared_norm,
    products,
    squared_norm_of_products,
)
from lightning_dp.per_sample.rules.short import add_weighted_product, is_short, multiply, operands

_COST_OF_KEEPING = 20
"""Multiplications in the time that one number of a kept gradient costs (measured on a CPU)."""


def prefer_kept(num_positions: int, num_in: int, num_out: int) -> bool:
    """Tell whether materializing per-sample gradients once is cheaper than Gram matrices and a weighted product.

    Per sample, materializing saves ``T^2 (d + p)`` multiplications. Writing and reading ``d p`` numbers twice costs as
    much time as ``_COST_OF_KEEPING d p`` multiplications.
    """
    return num_positions**2 * (num_in + num_out) > _COST_OF_KEEPING * num_in * num_out


class LinearRule(Rule):
    """The rule for ``nn.Linear``, with any number of positions, calls and rows per sample."""

    fills_buffers = True
    is_linear = True

    @override
    def follows(self, spec: Any, axis: int, num_axes: int) -> bool:
        return axis < num_axes - 1

    @override
    def per_sample(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        grads: dict[str, Tensor] = {}
        if "weight" in names and len(calls) == 1:
            ((_, inputs, backprops),) = _blocks(calls, batch_size)
            grads["weight"] = multiply(backprops.mT, inputs)
        elif "weight" in names:
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
            norms["weight"] = torch.cat(
                [squared_norm_of_products(inputs, backprops) for _, inputs, backprops in blocks]
            )
        if "bias" in names:
            norms["bias"] = squared_norm(_sums_over_positions(calls, batch_size))
        return norms

    @override
    def masked_squared_norms(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, masks: Mapping[str, ParameterMask]
    ) -> dict[str, Tensor]:
        norms: dict[str, Tensor] = {}
        if "weight" in masks and _num_positions(calls, batch_size) == 1:
            ((_, inputs, backprops),) = _blocks(calls, batch_size)
            norms["weight"] = masked_outer_squared_norm(masks["weight"], backprops[:, 0], inputs[:, 0])
        elif "weight" in masks:
            weights = masks["weight"].active.to(accumulation_dtype(calls[0].backprop))
            blocks = _blocks(calls, batch_size)
            norms["weight"] = torch.cat([product_squared_norm(g, a, weights) for _, a, g in blocks])
        if "bias" in masks:
            norms["bias"] = squared_norm(_sums_over_positions(calls, batch_size) * masks["bias"].active)
        return norms

    @override
    def add_weighted_sum(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        factors: Tensor,
        batch_size: int,
        out: Mapping[str, Tensor],
    ) -> None:
        if "bias" in out:  # computed from the same sums as its norms
            out["bias"].add_(weighted_rows(_sums_over_positions(calls, batch_size), factors))
        if "weight" not in out:
            return
        short = _are_short(calls, batch_size)
        for call in calls:  # one by one, so that no tensor has the size of all together
            inputs, backprops = _split(call.activation, batch_size), _split(call.backprop, batch_size)
            inputs, backprops = operands(inputs, backprops, short=short)
            add_weighted_product(out["weight"], backprops, inputs, factors)

    @override
    def prefers_active_entries(self, calls: Sequence[Call], batch_size: int, name: str) -> bool:
        return name == "weight" and _num_positions(calls, batch_size) > 1

    @override
    def active_entries(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str, mask: ParameterMask
    ) -> Tensor:
        if name != "weight":
            return super().active_entries(module, calls, batch_size, name, mask)
        found = []
        for _, inputs, backprops in _blocks(calls, batch_size):
            found += [mask.select_rows(part) for _, part in products(backprops, inputs)]
        return torch.cat(found) if found else widen(calls[0].backprop).new_zeros(0, mask.num_active)

    @override
    def add_active_entries(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        factors: Tensor,
        batch_size: int,
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask],
    ) -> set[str]:
        if "weight" not in out or len(calls) > 1:
            return set()
        ((_, inputs, backprops),) = _blocks(calls, batch_size)
        if inputs.shape[1] != 1:
            return set()
        entries = masked_outer_sum(masks["weight"], backprops[:, 0], inputs[:, 0], factors)
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
            multiply(backprops.mT, inputs, out[rows])

    @override
    def materialises(self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str) -> bool:
        if not batch_size or name != "weight":
            return False
        num_positions = _num_positions(calls, batch_size)
        if num_positions == len(calls):  # one position a call: a single one, or a recurrence, whose calls are all small
            return False
        sizes = num_positions, calls[0].activation.shape[-1], calls[0].backprop.shape[-1]
        if _are_short(calls, batch_size):  # products are cheap there, memory is not
            return not prefer_gram(*sizes)
        return prefer_kept(*sizes)


def _blocks(calls: Sequence[Call], batch_size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield slices of samples with the inputs ``(b, T, d)`` and backprops ``(b, T, p)`` of all calls, in the type in
    which they are multiplied.

    Several calls are copied together for a few samples at a time, so that the copy stays small. Each block of copies
    overwrites the previous one.
    """
    inputs = [_split(call.activation, batch_size) for call in calls]
    backprops = [_split(call.backprop, batch_size) for call in calls]
    short = _are_short(calls, batch_size)
    if len(calls) == 1:
        yield slice(None), *operands(inputs[0], backprops[0], short=short)
        return
    num_positions = sum(tensor.shape[1] for tensor in backprops)
    widths = (inputs[0].shape[2], backprops[0].shape[2])
    step = samples_a_block(batch_size, num_positions * sum(widths), backprops[0].device)
    dtype = torch.bfloat16 if short else accumulation_dtype(backprops[0])
    new = partial(torch.empty, dtype=dtype, device=backprops[0].device)
    joined = [new(step, num_positions, width) for width in widths]
    for low in range(0, max(1, batch_size), step):
        rows = slice(low, min(low + step, batch_size))
        parts = [buffer[: rows.stop - low] for buffer in joined]
        for side, part in zip((inputs, backprops), parts, strict=True):
            torch.cat([tensor[rows] for tensor in side], dim=1, out=part)
        yield rows, parts[0], parts[1]


def _are_short(calls: Sequence[Call], batch_size: int) -> bool:
    """Tell whether norms and sums multiply bfloat16 operands: not for one position, which needs no large product."""
    return all(is_short(call.backprop) for call in calls) and _num_positions(calls, batch_size) > 1


def _sums_over_positions(calls: Sequence[Call], batch_size: int) -> Tensor:
    """Return every sample's backprops added over positions and calls, shape ``(B, p)``, in the accumulation dtype."""
    sums: Tensor | None = None
    for backprop in (widen(_split(call.backprop, batch_size)) for call in calls):
        added = backprop[:, 0] if backprop.shape[1] == 1 else backprop.sum(1)
        sums = added if sums is None else sums + added
    assert sums is not None
    return sums


def _num_positions(calls: Sequence[Call], batch_size: int) -> int:
    """Return ``T``, the positions per sample over all calls; 0 for an empty batch."""
    return sum(call.activation.shape[:-1].numel() for call in calls) // max(1, batch_size)


def _split(tensor: Tensor, batch_size: int) -> Tensor:
    if batch_size == 0:
        return tensor.new_zeros(0, 1, tensor.shape[-1])
    return tensor.reshape(batch_size, tensor.shape[:-1].numel() // batch_size, tensor.shape[-1])
