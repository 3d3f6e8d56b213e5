"""Bounds on rounding, so that a reported norm is never below the sample's true contribution to the weighted sum.

The norm of a sample's gradient ``sum_t g_t a_t^T`` and its share ``f sum_t g_t a_t^T`` of the weighted sum often come
from different products. Where the terms cancel, both are rounding errors of their own: one may be 0 while the other is
large. With the unit roundoff ``u = eps / 2`` and ``S = sum_t |a_t| |g_t|``,

    | |computed sum| / f - |true gradient| |  <= (T + 3) u S    T - 1 additions, in any order; scaling, product, buffer
    | computed norm - |true gradient| |       <= T u S          T - 1 additions, in any order; product

so a computed norm plus ``(T + 4) eps S`` bounds the contribution: :func:`with_rounding`. The bound holds for
any partial sums, since each of them is at most ``f S``, and for any other samples in the same product.

Long sums are added up in blocks, lanes and threads, and their errors have both signs: the error that occurs grows like
``sqrt(T) / 3``. So :func:`sum_error` grows up to 80 terms only. It stays below ``1e-5 S``, so that ordinary norms do
not change visibly (``S`` is about ``sqrt(T)`` times the norm of a gradient whose terms do not cancel), and for 1,000
terms 80 is more than 8 times the error that occurs.

Nothing has to be added if norm and sum are taken from the same tensor of per-sample gradients: cached gradients, those
of small or expanded parameters, those of parameters that are used in several ways, and gradients of single samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dp.per_sample.rules.base import accumulation_dtype

_MOST_TERMS = 80

GRAM_ERROR = 8
"""Rounding of ``<A^T A, G^T G>`` in units of ``eps S^2``: entries of both matrices and their sum; 3 is the most
measured, for vectors of up to 16,384 equal numbers.
"""


def sum_error(num_terms: int, dtype: torch.dtype) -> float:
    """Return a bound on the rounding of one sum, relative to the sum of the lengths of its terms.

    Args:
        num_terms: ``T``.
        dtype: of the terms and sums.

    Example:
        >>> sum_error(4, torch.float64) == 4 * 2.0**-52
        True
    """
    return float(torch.finfo(dtype).eps) * min(num_terms + 4, _MOST_TERMS) / 2


def lengths(vectors: Tensor, dim: int = -1) -> Tensor:
    """Return the L2 norms along an axis, each at least the smallest norm whose square does not underflow."""
    norms = torch.linalg.vector_norm(vectors, dim=dim, dtype=accumulation_dtype(vectors))
    return at_least_tiny(norms, vectors.shape[dim])


def at_least_tiny(norms: Tensor, size: int) -> Tensor:
    """Return norms of vectors of length ``size``, raised so that their squares do not underflow."""
    return norms.clamp_min((torch.finfo(norms.dtype).tiny * size) ** 0.5)


def with_rounding(
    squared_norms_B: Tensor, total_B: Tensor, num_terms: int, *, sums: int = 2, more: float = 0.0
) -> Tensor:
    """Return ``(N + (T + 4) eps S)^2``: squared norms that bound the weighted sum despite rounding.

    **Guarantee**: not finite where ``S`` is not; such a sample is dropped.

    Args:
        squared_norms_B: ``N^2``, shape ``(B,)``.
        total_B: ``S``, shape ``(B,)``.
        num_terms: ``T``.
        sums: 2 if the norm is also computed from a sum over the terms; 1 if it already includes its own rounding.
        more: further errors, relative to ``S``; see ``short.py``.
    """
    rounding_B = (sums * sum_error(num_terms, squared_norms_B.dtype) + more) * total_B
    return (squared_norms_B.sqrt() + rounding_B).square()


def gram_with_rounding(
    products_B: Tensor, inputs_BT: Tensor, backprops_BT: Tensor, *, of_matrices: float = 0.0, of_sum: float = 0.0
) -> Tensor:
    """Return squared norms from products of Gram matrices, including the rounding of the matrices and of the sum.

    Args:
        products_B: ``<A^T A, G^T G>``, shape ``(B,)``; rounding may have made it negative.
        inputs_BT: ``|a_t|``, as :func:`lengths` gives it.
        backprops_BT: ``|g_t|``.
        of_matrices: further errors of the entries of both matrices, relative to the lengths; see ``short.py``.
        of_sum: further errors of the weighted sum, relative to ``S``.
    """
    total_B: Tensor = torch.linalg.vecdot(inputs_BT, backprops_BT)
    rounding_B = (GRAM_ERROR * torch.finfo(total_B.dtype).eps + of_matrices) * total_B.square()
    return with_rounding(products_B.clamp_min(0.0) + rounding_B, total_B, inputs_BT.shape[1], sums=1, more=of_sum)
