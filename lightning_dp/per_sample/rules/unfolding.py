"""The unfolded input ``U`` of a convolution, and the Gram matrix of ``U`` computed without unfolding.

Shape legend: ``N`` inputs, ``R`` rows, ``G`` groups, ``C`` channels of a group, ``W`` = C x kernel positions, ``K``
rows of one sample, ``P`` output positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Conv: TypeAlias = "nn.Conv1d | nn.Conv2d | nn.Conv3d"


def unfolded(conv: Conv, x: Tensor, padding: tuple[int, ...], groups: int) -> Tensor:
    """Return a copy of the unfolded input ``U``, shape ``(R, G, W, P)``, with one column per output position."""
    if any(padding):
        x = F.pad(x, [side for size in reversed(padding) for side in (size, size)])
    axes = len(conv.kernel_size)
    for axis in range(axes):
        span = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, span, conv.stride[axis])[..., :: conv.dilation[axis]]
    # (R, in_channels, *positions, *kernel) -> (R, in_channels, *kernel, *positions)
    x = x.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    width = x.shape[1] // groups * conv.weight[0, 0].numel()
    return x.reshape(x.shape[0], groups, width, -1)


def window_sums(conv: Conv, x: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Return the sum over each output position's window: ``(R, C, *map) -> (R, C, *positions)``."""
    if any(padding):
        x = F.pad(x, [side for size in reversed(padding) for side in (size, size)])
    for axis, (kernel, dilation, stride) in enumerate(
        zip(conv.kernel_size, conv.dilation, conv.stride, strict=True), 2
    ):
        windows = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        x = windows[..., 0].clone()
        for offset in range(1, kernel):
            x += windows[..., offset]
    return x


def gram(x: Tensor) -> Tensor:
    """Return ``x^T x`` over all positions of ``(N, C, *map)``, shape ``(N, P, P)``."""
    flat = x.flatten(2)
    return torch.bmm(flat.mT, flat)


def unfolded_gram(conv: Conv, x: Tensor, padding: tuple[int, ...], positions: Sequence[int]) -> Tensor:
    """Return ``U^T U`` over output positions ``(K, *map)``, shape ``(N, P, P)``, for ``x`` of shape ``(N, C, K,
    *map)``.

    Output position p reads input position ``s p + d k - pad`` at kernel position k, so with ``X = x^T x``

        (U^T U)_pq = sum_k X[s p + d k - pad, s q + d k - pad]

    Along an axis, kernel positions that read the same residue modulo s read the same part of the input, at different
    shifts: they share one product, and nothing is unfolded. If these products are not smaller than the product of
    ``U`` (the kernel is no larger than the stride, or nearly as large as the input), the input is unfolded.
    """
    size, axes = x.shape[0], len(conv.kernel_size)
    kinds = list(itertools.product(*(_shifts(conv, padding, axis) for axis in range(axes))))
    parts = [_part(x, [residue for residue, _ in kind], conv.stride) for kind in kinds]
    if sum(part[0, 0].numel() ** 2 for part in parts) >= conv.weight[0, 0].numel() * math.prod(positions) ** 2:
        rows = unfolded(conv, x.transpose(1, 2).flatten(0, 1), padding, groups=1)
        return gram(rows.reshape(size, -1, *rows.shape[2:]).transpose(1, 2))
    total = x.new_zeros(size, *positions, *positions)
    for kind, part in zip(kinds, parts, strict=True):
        product = gram(part).reshape(size, *part.shape[2:], *part.shape[2:])
        for axis, (_, shifts) in enumerate(kind, start=2):
            product = _shifted(product, axis, axis + axes + 1, shifts, positions[axis - 1])
        total += product
    return total.reshape(size, math.prod(positions), -1)


def _part(x: Tensor, residues: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Return a view of ``(N, C, K, *map)`` with the positions that have these residues modulo the strides."""
    for axis, (residue, stride) in enumerate(zip(residues, strides, strict=True), start=3):
        x = x[(slice(None),) * axis + (slice(residue, None, stride),)]
    return x


def _shifts(conv: Conv, padding: Sequence[int], axis: int) -> list[tuple[int, list[int]]]:
    """Return ``(b, [a, ...])`` per residue: at one kernel position per shift a, output p reads input ``s (p +
    a) + b``.
    """
    shifts: dict[int, list[int]] = {}
    for kernel_position in range(conv.kernel_size[axis]):
        shift, residue = divmod(conv.dilation[axis] * kernel_position - padding[axis], conv.stride[axis])
        shifts.setdefault(residue, []).append(shift)
    return list(shifts.items())


def _shifted(product: Tensor, row: int, column: int, shifts: Sequence[int], num_positions: int) -> Tensor:
    """Return ``sum_a product[p + a, q + a]`` along one axis of positions; positions outside the input count as zero."""
    length = product.shape[row]
    if len(shifts) == 1 and 0 <= shifts[0] <= length - num_positions:
        return product.narrow(row, shifts[0], num_positions).narrow(column, shifts[0], num_positions)
    shape = list(product.shape)
    shape[row] = shape[column] = num_positions
    total = product.new_zeros(shape)
    for shift in shifts:
        low, high = max(0, -shift), min(num_positions, length - shift)
        if low < high:
            read = product.narrow(row, low + shift, high - low).narrow(column, low + shift, high - low)
            total.narrow(row, low, high - low).narrow(column, low, high - low).add_(read)
    return total
