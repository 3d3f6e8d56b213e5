"""Matrix products of bfloat16 operands with sums in float32, on devices whose matrix units do both.

Operations that ran in bfloat16 leave backprops, and used activations, of 8 significant bits. The product of two such
numbers has 16 and is exact in float32, so a product of the operands as they are loses nothing against one of widened
copies. On a GPU it is several times faster, because float32 products do not use the matrix units.

A clipping factor has more bits, and a factor times an operand has to be rounded. It is split in two, ``f g = h + l``:

    h = bf16(f g),    l = bf16(f g - h),    |f g - h - l| <= 2^-8 |f g - h| <= 2^-16 |f g|

``f g - h`` is exact in float32, and rounding to bfloat16 has a relative error of at most 2^-8. So the weighted sum of a
sample's ``T`` terms is off by at most ``2^-16 S``, with ``S = f sum_t |a_t| |g_t|``: :data:`SPLIT_ERROR`. One rounding
would leave ``2^-8 S``, which is a third of the norm for long samples whose terms cancel.

Matrix units may truncate where they add, so errors of a sum need not have both signs. Each addition of a block of at
least eight exact products costs at most 2^-23 of the sum of lengths: :func:`short_error`. The norms include all three
errors, see ``rounding.py``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample.rules.base import widen

#: Rounding of a weighted sum of split operands, relative to the sum of the lengths of its terms.
SPLIT_ERROR = 2.0**-16
_BLOCK, _TRUNCATION = 8, 2.0**-23

_WIDE_ROW = 16
"""Numbers of a row from which an outer product is faster entry by entry than as a matrix product."""


def short_error(num_terms: int) -> float:
    """Return a bound on the rounding of a sum of exact products, relative to the sum of the lengths of its terms.

    Args:
        num_terms: terms of the sum.

    Example:
        >>> short_error(112) == 16 * 2.0**-23
        True
    """
    return _TRUNCATION * (num_terms / _BLOCK + 2)


@lru_cache
def has_short_products(device_type: str) -> bool:
    """Tell whether a device multiplies bfloat16 matrices with sums and results in float32."""
    if device_type != "cuda":
        return False
    one = torch.ones(1, 16, 16, dtype=torch.bfloat16, device=device_type)
    try:
        return bool(_product(one, one)[0, 0, 0] == 16)
    except (RuntimeError, TypeError, NotImplementedError):  # an older device, or torch before 2.8
        return False


def is_short(backprop: Tensor) -> bool:
    """Tell whether an operation ran in bfloat16, on a device that multiplies such operands as they are."""
    return backprop.dtype == torch.bfloat16 and has_short_products(backprop.device.type)


def operands(activation: Tensor, backprop: Tensor, *, short: bool) -> tuple[Tensor, Tensor]:
    """Return both operands of a gradient in the type in which they are multiplied.

    An operation under autocast is given float32 and rounds it: the rounded activation is the one that it has used.

    Args:
        activation: input of the operation.
        backprop: gradient of its output.
        short: whether both are multiplied in bfloat16, in all calls of a layer alike; see :func:`is_short`.
    """
    if short:
        return activation.to(torch.bfloat16), backprop
    return widen(activation), widen(backprop)


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the matrix products ``left @ right`` of two batches in their accumulation type.

    Args:
        left: (b, n, k), from :func:`operands`.
        right: (b, k, m), of the same type.
        out: (b, n, m), written in place of a new tensor.
    """
    if left.dtype == torch.bfloat16:
        return _product(left, right, out)
    if left.shape[2] == 1 and right.shape[2] >= _WIDE_ROW:
        return torch.mul(left, right, out=out)
    return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)


def add_weighted_product(out: Tensor, left: Tensor, right: Tensor, factors: Tensor) -> None:
    """Add ``sum_i factors[i] left_i^T right_i`` to ``out``, scaling the smaller operand.

    Args:
        out: (p, d), in an accumulation type.
        left: (B, T, p), from :func:`operands`.
        right: (B, T, d), of the same type.
        factors: (B,), finite.
    """
    scales_right = right.shape[2] < left.shape[2]
    scaled = widen(right if scales_right else left)
    scaled = scaled * factors.to(scaled.dtype).reshape(-1, 1, 1)
    other = (left if scales_right else right).flatten(0, 1)
    for part in _parts(scaled.flatten(0, 1), other):
        one, two = (other.mT, part) if scales_right else (part.mT, other)
        if one.dtype == torch.bfloat16:
            out.add_(_product(one, two))
        elif out.dtype == one.dtype:
            out.addmm_(one, two)
        else:
            out.add_(one @ two)


def _parts(scaled: Tensor, other: Tensor) -> list[Tensor]:
    """Return tensors of the other operand's type that add up to the scaled operand."""
    if other.dtype != torch.bfloat16:
        return [scaled]
    high = scaled.to(torch.bfloat16)
    return [high, scaled.sub_(high).to(torch.bfloat16)]


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the product of bfloat16 matrices, or of batches of them, in float32."""
    matmul: Any = torch.mm if left.dim() == 2 else torch.bmm
    product: Tensor
    if out is None:
        product = matmul(left, right, out_dtype=torch.float32)
    else:
        product = matmul(left, right, out_dtype=torch.float32, out=out)
    return product
