"""The rule for ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

The gradient of sample i is a product of its unfolded input ``U_i`` (one column per position) and its backprop ``g_i``:

    grad_i = g_i U_i^T,    |grad_i|^2 = sum_pq (g_i^T g_i)_pq (U_i^T U_i)_pq,    sum_i f_i grad_i = conv_weight(x, f g)

:func:`choose_route` chooses between several ways to compute it:

- ``"grouped"``: samples become the groups of one convolution and its weight gradient is per-sample. No unfolding.
- ``"unfold"``: unfold the input and multiply. Takes more memory; faster if grouped convolutions are slow.
- ``"gram"``: the norm from two Gram matrices over positions; no per-sample gradient. For small maps and wide layers.

The weighted sum never needs a per-sample gradient: it is one native weight gradient of the scaled backprop.

Shape legend: ``B`` samples, ``K`` rows of a sample, ``R = B * K``, ``G`` groups, ``W`` = in_channels / G x kernel
positions (the width of ``U``), ``O`` = out_channels / G, ``P`` output positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad as nn_grad
from typing_extensions import override

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample.rules.base import (
    Call,
    Rule,
    is_cheap_to_read,
    squared_norm,
    sum_rows,
    weighted_rows,
    widen,
)
from lightning_dp.per_sample.rules.conv_routes import Route, blocks, choose_route, shape_of
from lightning_dp.per_sample.rules.rounding import at_least_tiny, gram_with_rounding, lengths, with_rounding
from lightning_dp.per_sample.rules.unfolding import Conv, gram, unfolded, unfolded_gram, window_sums

_WEIGHT_GRADIENTS = {1: nn_grad.conv1d_weight, 2: nn_grad.conv2d_weight, 3: nn_grad.conv3d_weight}


class ConvRule(Rule):
    """Per-sample gradients of convolutions: any stride, dilation, groups, padding and padding mode.

    **Guarantee**: every route gives the same numbers up to rounding; a sample's numbers come from its rows only.

    Example:
        >>> layer, x = nn.Conv2d(3, 4, 3, padding="same"), torch.randn(2, 3, 8, 8)
        >>> call = Call(inputs=(), kwargs={}, activation=x, backprop=torch.ones(2, 4, 8, 8))
        >>> ConvRule().per_sample(layer, [call], 2, {"weight"})["weight"].shape
        torch.Size([2, 4, 3, 3, 3])
    """

    is_linear = True

    @override
    def follows(self, spec: Any, axis: int, num_axes: int) -> bool:
        return axis == 0 and num_axes == len(spec.kernel_size) + 2

    @override
    def per_sample(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        conv = _checked(module)
        grads = {}
        if "weight" in names:
            shape = shape_of(conv, calls, batch_size)
            route = choose_route(shape, norms_only=False)
            if len(list(blocks(batch_size, shape, route))) == 1:
                grads["weight"] = _weight_gradients(conv, calls, route)
            else:
                grads["weight"] = _product(calls[0]).new_empty(batch_size, *conv.weight.shape)
                for low, high, part in _gradients_in_blocks(conv, calls, batch_size):
                    grads["weight"][low:high] = part
        if "bias" in names:
            grads["bias"] = _bias_gradients(calls)
        return grads

    @override
    def squared_norms(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        return self._norms(module, calls, batch_size, dict.fromkeys(names))

    @override
    def masked_squared_norms(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, masks: Mapping[str, ParameterMask]
    ) -> dict[str, Tensor]:
        return self._norms(module, calls, batch_size, masks)

    def _norms(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, masks: Mapping[str, ParameterMask | None]
    ) -> dict[str, Tensor]:
        norms = {}
        if "weight" in masks:
            norms["weight"] = _weight_norms(_checked(module), calls, batch_size, masks["weight"])
        if "bias" in masks:
            mask, gradients = masks["bias"], _bias_gradients(calls)
            norms["bias"] = squared_norm(gradients if mask is None else gradients * mask.active)
        return norms

    @override
    def prefers_active_entries(self, calls: Sequence[Call], batch_size: int, name: str) -> bool:
        return name == "weight"

    @override
    def active_entries(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str, mask: ParameterMask
    ) -> Tensor:
        if name != "weight":
            return super().active_entries(module, calls, batch_size, name, mask)
        entries = _product(calls[0]).new_empty(batch_size, mask.num_active)
        for low, high, grads in _gradients_in_blocks(_checked(module), calls, batch_size):
            torch.index_select(grads.flatten(1), 1, mask.indices, out=entries[low:high])
        return entries

    @override
    def add_weighted_sum(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        factors: Tensor,
        batch_size: int,
        out: Mapping[str, Tensor],
    ) -> None:
        conv = _checked(module)
        for call in calls if "weight" in out else ():
            row_factors = factors.repeat_interleave(call.multiplicity)
            x, backprop, padding = _prepared(conv, call)
            scaled, x = _scaled_rows(backprop, row_factors), _kept_rows(x, row_factors)
            shape = tuple(conv.weight.shape)
            out["weight"].add_(_native_gradient(conv, x, shape, scaled, padding, conv.groups))
        if "bias" in out:  # computed from the same sums as its norms
            out["bias"].add_(weighted_rows(_bias_gradients(calls), factors))

    @override
    def materialises(self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str) -> bool:
        return (
            name == "weight" and choose_route(shape_of(_checked(module), calls, batch_size), norms_only=True) != "gram"
        )


def _checked(module: nn.Module) -> Conv:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return module


def _product(call: Call) -> Tensor:
    """Return an empty tensor with the dtype and device of the layer's gradients."""
    return widen(call.backprop)[:0]


def _rows_of(call: Call, low: int, high: int) -> Call:
    """Return the call restricted to samples ``low`` to ``high - 1``."""
    rows = slice(low * call.multiplicity, high * call.multiplicity)
    return replace(call, activation=call.activation[rows], backprop=call.backprop[rows])


def _scaled_rows(rows: Tensor, row_factors: Tensor) -> Tensor:
    factors = row_factors.to(rows.dtype).reshape(-1, *[1] * (rows.dim() - 1))
    if is_cheap_to_read(rows) and bool((row_factors != 0).all()):
        return rows * factors
    return torch.where(factors != 0, rows * factors, rows.new_zeros(()))


def _kept_rows(rows: Tensor, row_factors: Tensor) -> Tensor:
    """Replace the rows of factor 0 by zeros, because 0 times a non-finite row is not zero."""
    kept = row_factors != 0
    if is_cheap_to_read(rows) and bool(kept.all()):
        return rows
    return torch.where(kept.reshape(-1, *[1] * (rows.dim() - 1)), rows, rows.new_zeros(()))


def _prepared(conv: Conv, call: Call) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Apply all padding but symmetric zeros; return input, backprop and the zero padding left to apply."""
    x, backprop = widen(call.activation), widen(call.backprop)
    x = x.to(backprop.dtype)
    zeros_left = tuple(0 for _ in conv.kernel_size)
    if conv.padding_mode != "zeros":
        return F.pad(x, _sides(conv), mode=conv.padding_mode), backprop, zeros_left
    if not isinstance(conv.padding, str):
        return x, backprop, tuple(conv.padding)
    # "same" and "valid": both sides of every axis, last axis first; "same" may need one more on the right
    sides = _sides(conv)
    left, right = tuple(sides[-2::-2]), tuple(sides[::-2])
    if left == right:
        return x, backprop, left
    return F.pad(x, sides), backprop, zeros_left


def _sides(conv: Conv) -> list[int]:
    """Return the padding of both sides of every axis, last axis first, in the format of ``F.pad``."""
    if conv.padding == "valid":
        return [0] * (2 * len(conv.kernel_size))
    if isinstance(conv.padding, str):
        totals = [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [side for size in reversed(conv.padding) for side in (int(size), int(size))]


def _native_gradient(
    conv: Conv, x: Tensor, weight_shape: tuple[int, ...], backprop: Tensor, padding: tuple[int, ...], groups: int
) -> Tensor:
    weight_gradient: Callable[..., Tensor] = _WEIGHT_GRADIENTS[len(conv.kernel_size)]
    return weight_gradient(
        x, weight_shape, backprop, stride=conv.stride, padding=padding, dilation=conv.dilation, groups=groups
    )


def _weight_gradients(conv: Conv, calls: Sequence[Call], route: Route) -> Tensor:
    """Return per-sample gradients ``(B, *weight.shape)``, ``B >= 1``, added over calls; the caller may modify them."""
    total: Tensor | None = None
    for call in calls:
        x, backprop, padding = _prepared(conv, call)
        if route == "grouped":
            rows = x.shape[0]
            grads = _native_gradient(
                conv,
                x.reshape(-1).view(1, -1, *x.shape[2:]),  # axes of length 1 get ordinary strides, as kernels ask for
                (rows * conv.out_channels, *conv.weight.shape[1:]),
                backprop.reshape(-1).view(1, -1, *backprop.shape[2:]),
                padding,
                rows * conv.groups,
            )
        else:
            columns = unfolded(conv, x, padding, conv.groups).flatten(0, 1)
            grads = torch.bmm(backprop.reshape(len(columns), -1, columns.shape[2]), columns.mT)
        grads = sum_rows(grads.reshape(-1, *conv.weight.shape), call.multiplicity)
        total = grads if total is None else total + grads
    assert total is not None
    return total


def _weight_norms(conv: Conv, calls: Sequence[Call], batch_size: int, mask: ParameterMask | None) -> Tensor:
    """Return squared norms ``(B,)`` of the (masked) weight gradients, in blocks of samples."""
    shape = shape_of(conv, calls, batch_size)
    norms = _product(calls[0]).new_empty(batch_size)
    if mask is None and choose_route(shape, norms_only=True) == "gram":
        for low, high in blocks(batch_size, shape, "gram"):
            norms[low:high] = _gram_norms(conv, [_rows_of(call, low, high) for call in calls], high - low)
        return norms
    weights = None if mask is None else mask.active.to(norms.dtype)
    for low, high, grads in _gradients_in_blocks(conv, calls, batch_size):
        norms[low:high] = squared_norm(grads if weights is None else grads.mul_(weights))
    return with_rounding(norms, _sum_of_lengths(conv, calls, batch_size), shape.positions)


def _sum_of_lengths(conv: Conv, calls: Sequence[Call], batch_size: int) -> Tensor:
    """Return ``sum_p |U_p| |g_p|`` over all positions, rows and calls, shape ``(B,)``: the L2 norm over the groups."""
    sums: list[Tensor] = []
    for call in calls:
        x, backprop, padding = _prepared(conv, call)
        x, backprop = (
            one.reshape(len(one), conv.groups, one.shape[1] // conv.groups, *one.shape[2:]) for one in (x, backprop)
        )
        squares = torch.linalg.vector_norm(x, dim=2).square()
        inputs = at_least_tiny(window_sums(conv, squares, padding).sqrt(), x.shape[2] * conv.weight[0, 0].numel())
        products = inputs.mul_(lengths(backprop, dim=2)).flatten(2).sum(2)
        sums.append(products.reshape(batch_size, call.multiplicity, conv.groups).sum(1))
    return squared_norm(torch.stack(sums).sum(0)).sqrt()


def _gradients_in_blocks(conv: Conv, calls: Sequence[Call], batch_size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ranges of samples with their weight gradients, which the caller may modify."""
    shape = shape_of(conv, calls, batch_size)
    route = choose_route(shape, norms_only=False)
    for low, high in blocks(batch_size, shape, route):
        yield low, high, _weight_gradients(conv, [_rows_of(call, low, high) for call in calls], route)


def _gram_norms(conv: Conv, calls: Sequence[Call], samples: int) -> Tensor:
    """Return squared norms ``(B,)``, ``B >= 1``, from Gram matrices over all positions of all rows and calls."""
    inputs, backprops, paddings = zip(*(_prepared(conv, call) for call in calls), strict=True)
    x, backprop = (
        torch.cat([_with_rows(one, samples, conv.groups) for one in side], dim=2) for side in (inputs, backprops)
    )
    gram_x, gram_g = unfolded_gram(conv, x, paddings[0], backprop.shape[2:]), gram(backprop)
    total = torch.linalg.vecdot(gram_x.flatten(1), gram_g.flatten(1))
    widths = (x.shape[1] * conv.weight[0, 0].numel(), backprop.shape[1])
    squares = (one.diagonal(dim1=1, dim2=2).clamp_min(0.0) for one in (gram_x, gram_g))
    sides = (at_least_tiny(one.sqrt(), width) for one, width in zip(squares, widths, strict=True))
    return gram_with_rounding(total, *sides).reshape(samples, conv.groups).sum(1)


def _with_rows(tensor: Tensor, samples: int, groups: int) -> Tensor:
    """Reshape ``(B * K, G * C, *map)`` to ``(B * G, C, K, *map)``: a sample's rows become an axis of positions."""
    rows, channels = tensor.shape[0] // samples, tensor.shape[1] // groups
    apart = tensor.reshape(samples, rows, groups, channels, *tensor.shape[2:])
    return apart.transpose(1, 2).transpose(2, 3).flatten(0, 1)


def _bias_gradients(calls: Sequence[Call]) -> Tensor:
    parts = [sum_rows(widen(call.backprop).flatten(2).sum(2), call.multiplicity) for call in calls]
    return torch.stack(parts).sum(0)
