"""Squared norms of sums of outer products, by the cheapest computation, also under masks.

    grad_i = sum_t left_it right_it^T

Legend: ``B`` samples, ``T`` positions of a sample, ``d`` and ``p`` the lengths of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample.rules.base import accumulation_dtype, samples_a_block, squared_norm, widen
from lightning_dp.per_sample.rules.rounding import at_least_tiny, gram_with_rounding, lengths, with_rounding
from lightning_dp.per_sample.rules.short import SPLIT_ERROR, multiply, short_error

_LARGE = 1e6
"""Squared norms above this make squares that have vanished in the other factor count."""

_HUGE = 1e30
"""Squared norms above which rounding leaves no norm under a mask."""

_GRAM_BLOCKS = {"cpu": 128}
"""Positions of a block of Gram matrices, of which those above the diagonal are left out: they are symmetric. Other
devices are better off with few large products.
"""


def prefer_gram(num_positions: int, num_in: int, num_out: int) -> bool:
    """Tell whether the Gram matrices of the positions cost less than the per-sample gradients.

    Multiplications per sample: ``T^2 (d + p)`` against ``T d p``.
    """
    return num_positions * (num_in + num_out) <= num_in * num_out


def squared_norm_of_products(inputs_BTd: Tensor, backprops_BTp: Tensor) -> Tensor:
    """Return ``|sum_t g_t a_t^T|^2`` for every sample, shape ``(B,)``, by the product that costs least."""
    if inputs_BTd.shape[1] == 1:
        return outer_squared_norm(widen(inputs_BTd[:, 0]), widen(backprops_BTp[:, 0]))
    if prefer_gram(inputs_BTd.shape[1], inputs_BTd.shape[2], backprops_BTp.shape[2]):
        return gram_squared_norm(inputs_BTd, backprops_BTp)
    return product_squared_norm(backprops_BTp, inputs_BTd)


def gram_squared_norm(inputs_BTd: Tensor, backprops_BTp: Tensor) -> Tensor:
    """Return ``|sum_t g_t a_t^T|^2 = sum_{s,t} (a_s . a_t)(g_s . g_t)`` for every sample, shape ``(B,)``.

    **Guarantee**: bounds on the rounding of this sum and of the weighted sum are added, so a norm is never below the
    sample's contribution.
    """
    sides, widths = (inputs_BTd, backprops_BTp), (inputs_BTd.shape[2], backprops_BTp.shape[2])
    positions = inputs_BTd.shape[1]
    if positions <= _block(inputs_BTd):
        left, right = (multiply(side, side.mT) for side in sides)
        total = torch.linalg.vecdot(left.flatten(1), right.flatten(1))
        squares = [gram.diagonal(dim1=1, dim2=2) for gram in (left, right)]
    else:
        total, squares = _grams_in_blocks(*sides)
    norms = [at_least_tiny(found.sqrt(), width) for found, width in zip(squares, widths, strict=True)]
    if inputs_BTd.dtype != torch.bfloat16:
        return gram_with_rounding(total, *norms)
    of_matrices, of_sum = sum(map(short_error, widths)), short_error(positions) + SPLIT_ERROR
    return gram_with_rounding(total, *norms, of_matrices=of_matrices, of_sum=of_sum)


def _block(inputs_BTd: Tensor) -> int:
    return _GRAM_BLOCKS.get(inputs_BTd.device.type, 1024)


def _grams_in_blocks(inputs_BTd: Tensor, backprops_BTp: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the sum of the products of both Gram matrices, shape ``(B,)``, and their diagonals, ``(B, T)``."""
    size, positions = inputs_BTd.shape[:2]
    total = inputs_BTd.new_zeros(size, dtype=accumulation_dtype(inputs_BTd))
    block = _block(inputs_BTd)
    squares: tuple[list[Tensor], list[Tensor]] = ([], [])
    for low in range(0, positions, block):
        high = min(low + block, positions)
        gram_a = multiply(inputs_BTd[:, low:high], inputs_BTd[:, low:].mT)
        gram_g = multiply(backprops_BTp[:, low:high], backprops_BTp[:, low:].mT)
        for gram, found in zip((gram_a, gram_g), squares, strict=True):
            found.append(gram.diagonal(dim1=1, dim2=2).clone())
        gram_a[:, :, : high - low].mul_(0.5)  # the block on the diagonal is symmetric, the others are visited once
        total += 2 * torch.linalg.vecdot(gram_a.flatten(1), gram_g.flatten(1))
    return total, [torch.cat(found, 1) for found in squares]


def outer_squared_norm(inputs_Bd: Tensor, backprops_Bp: Tensor) -> Tensor:
    """Return ``|g a^T|^2 = |a|^2 |g|^2`` for every sample, shape ``(B,)``."""
    norm_a = torch.linalg.vector_norm(inputs_Bd, dim=1).square()
    norm_g = torch.linalg.vector_norm(backprops_Bp, dim=1).square()
    norm_a, norm_g = _no_underflow(norm_a, norm_g, inputs_Bd.shape[1], backprops_Bp.shape[1])
    return norm_a * norm_g


def _no_underflow(norm_a: Tensor, norm_g: Tensor, num_in: int, num_out: int) -> tuple[Tensor, Tensor]:
    """Return both squared norms, each raised above underflow if the other is large, because the product may matter."""
    tiny = torch.finfo(norm_a.dtype).tiny
    return (
        torch.where(norm_g > _LARGE, norm_a.clamp_min(tiny * num_in), norm_a),
        torch.where(norm_a > _LARGE, norm_g.clamp_min(tiny * num_out), norm_g),
    )


def product_squared_norm(lefts_BTp: Tensor, rights_BTd: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return ``|weights * sum_t left_t right_t^T|^2`` for every sample, including the rounding of the weighted sum."""
    num_terms, is_short = lefts_BTp.shape[1], lefts_BTp.dtype == torch.bfloat16
    norms = lefts_BTp.new_empty(lefts_BTp.shape[0], dtype=accumulation_dtype(lefts_BTp))
    for rows, part in products(lefts_BTp, rights_BTd):
        if weights is not None:
            part.mul_(weights)
        norms[rows] = squared_norm(part)
    more = 2 * short_error(num_terms) + SPLIT_ERROR if is_short else 0.0
    total = torch.linalg.vecdot(lengths(lefts_BTp), lengths(rights_BTd))
    return with_rounding(norms, total, num_terms, more=more)


def products(lefts_BTp: Tensor, rights_BTd: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of samples with their ``sum_t left_t right_t^T``, in one small reused buffer."""
    size, num_left, num_right = lefts_BTp.shape[0], lefts_BTp.shape[2], rights_BTd.shape[2]
    step = samples_a_block(size, num_left * num_right, lefts_BTp.device)
    product = lefts_BTp.new_empty(step, num_left, num_right, dtype=accumulation_dtype(lefts_BTp))
    for low in range(0, size, step):
        rows = slice(low, min(low + step, size))
        part = product[: rows.stop - low]
        multiply(lefts_BTp[rows].mT, rights_BTd[rows], part)
        yield rows, part


def masked_outer_squared_norm(mask: ParameterMask, lefts_Bp: Tensor, rights_Bd: Tensor) -> Tensor:
    """Return ``sum_{p,d} mask[p, d] left[p]^2 right[d]^2`` per sample, shape ``(B,)``; infinite if a vector is huge.

    If one vector is large, underflowed squares of the other vector could matter, so an upper bound on them is added. If
    one vector is huge, the norm is infinite, and the sample counts as not finite, as with NaN.

    Args:
        mask: of shape ``(p, d)``.
        lefts_Bp: shape ``(B, p)``.
        rights_Bd: shape ``(B, d)``.
    """
    matrix = mask.next_matrix(rights_Bd.dtype)
    if matrix is None:
        norms: Tensor = torch.linalg.vecdot(lefts_Bp.square() @ mask.active.to(lefts_Bp.dtype), rights_Bd.square())
    else:
        norms = ((matrix @ _times(rights_Bd.mT, rights_Bd.mT)) * lefts_Bp.square().mT).sum(0)
    squares, tiny = (squared_norm(lefts_Bp), squared_norm(rights_Bd)), torch.finfo(norms.dtype).tiny
    for square, other in zip(squares, (rights_Bd, lefts_Bp), strict=True):
        norms = norms + torch.where(square > _LARGE, square * tiny * other.shape[1], 0.0)
    return torch.where(torch.maximum(*squares) <= _HUGE, norms, torch.inf)


def masked_outer_sum(mask: ParameterMask, lefts_Bp: Tensor, rights_Bd: Tensor, factors_B: Tensor) -> Tensor | None:
    """Return ``sum_i factors[i] left_i[p] right_i[d]`` at the active entries in row-major order; None if a dense
    product is faster.

    Args:
        mask: of shape ``(p, d)``.
        lefts_Bp: shape ``(B, p)``.
        rights_Bd: shape ``(B, d)``.
        factors_B: shape ``(B,)``.
    """
    matrix = mask.matrix(rights_Bd.dtype)
    if matrix is None:
        return None
    lefts_pB = _times(lefts_Bp.mT, factors_B.to(lefts_Bp.dtype))
    sums: Tensor = torch.sparse.sampled_addmm(matrix, lefts_pB, rights_Bd, beta=0.0)
    return sums.values()


def _times(one: Tensor, other: Tensor) -> Tensor:
    """Return the elementwise product as a contiguous tensor, so that a transposed view needs no separate copy."""
    return torch.mul(one, other, out=one.new_empty(one.shape))
