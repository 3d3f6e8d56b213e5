"""What is made once a mask: where its live entries are, and a sparse matrix for products with few of them.

At one live entry in ten MKL's sparse product takes two thirds of the time of a dense one, and no dense copy of the mask is
made in every step. Making the matrix takes as long as a product, so it is made for masks that are met again.
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_MOST_LIVE = 0.15
"""Largest share of live entries for which the sparse product is faster (measured on a CPU)."""

_LEAST_SIDE = 64
"""Shortest side of a mask for which it is: the sparse product first transposes the squares beside it (measured on a CPU)."""

_known: MutableMapping[Tensor, tuple[int, Tensor | None]] = WeakTensorKeyDictionary()
"""Mask to its version, and to its matrix from the second time on."""

_known_places: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()
"""Mask to its version and to where it is live."""

_DENSE = torch.empty(0)
"""Stands for the matrix of a mask with too many live entries, or too short a side."""


def sparse_of(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as a sparse matrix of 1 and 0, or None where a dense product is better.

    Args:
        mask: boolean, shape ``(p, d)``; a change in place is noticed.
        dtype: of the result.

    Returns:
        A CSR matrix, for the mask met for the second time and later.
    """
    if mask.device.type != "cpu" or mask.is_inference() or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return None
    version, matrix = _known.get(mask, (-1, None))
    if version != mask._version:
        _known[mask] = (mask._version, None)
        return None
    if matrix is None or (matrix is not _DENSE and matrix.dtype != dtype):
        matrix = _to_csr(mask, dtype) if _is_better_sparse(mask) else _DENSE
        _known[mask] = (version, matrix)
    return None if matrix is _DENSE else matrix


def places_of(mask: Tensor) -> Tensor:
    """Return the ascending positions of a mask's live entries in the flattened parameter; a change in place is noticed.

    Args:
        mask: boolean, of any shape.
    """
    if mask.is_inference():
        return mask.reshape(-1).nonzero().squeeze(1)
    version, places = _known_places.get(mask, (-1, _DENSE))
    if version != mask._version:
        places = mask.reshape(-1).nonzero().squeeze(1)
        _known_places[mask] = (mask._version, places)
    return places


def _is_better_sparse(mask: Tensor) -> bool:
    return min(mask.shape) >= _LEAST_SIDE and int(mask.count_nonzero()) <= _MOST_LIVE * mask.numel()


def _to_csr(mask: Tensor, dtype: torch.dtype) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return mask.to(dtype).to_sparse_csr()


def masked_outer_squared_norm(mask: Tensor, lefts_Bp: Tensor, rights_Bd: Tensor) -> Tensor:
    """Return ``sum_{p,d} mask[p, d] left[p]^2 right[d]^2`` for every sample, shape ``(B,)``.

    Args:
        mask: boolean, shape ``(p, d)``.
        lefts_Bp: shape ``(B, p)``.
        rights_Bd: shape ``(B, d)``.
    """
    matrix = sparse_of(mask, rights_Bd.dtype)
    if matrix is None:
        norms: Tensor = torch.linalg.vecdot(lefts_Bp.square() @ mask.to(lefts_Bp.dtype), rights_Bd.square())
        return norms
    products_pB: Tensor = matrix @ _times(rights_Bd.mT, rights_Bd.mT)
    return (products_pB * lefts_Bp.square().mT).sum(0)


def masked_outer_sum(mask: Tensor, lefts_Bp: Tensor, rights_Bd: Tensor, factors_B: Tensor) -> Tensor | None:
    """Return ``sum_B factor left[p] right[d]`` where the mask is live, row by row; None where a dense product is better.

    Args:
        mask: boolean, shape ``(p, d)``.
        lefts_Bp: shape ``(B, p)``.
        rights_Bd: shape ``(B, d)``.
        factors_B: shape ``(B,)``.
    """
    version, matrix = _known.get(mask, (-1, None))
    if matrix is None or matrix is _DENSE or version != mask._version or matrix.dtype != rights_Bd.dtype:
        return None
    lefts_pB = _times(lefts_Bp.mT, factors_B.to(lefts_Bp.dtype))
    sums: Tensor = torch.sparse.sampled_addmm(matrix, lefts_pB, rights_Bd, beta=0.0)
    return sums.values()


def _times(one: Tensor, other: Tensor) -> Tensor:
    """Return the product of a transposed view with something, row by row: transposed on the way, not in a pass of its own."""
    return torch.mul(one, other, out=one.new_empty(one.shape))
