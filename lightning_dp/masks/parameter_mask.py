"""ParameterMask: the active coordinates of one parameter, in every form that a step needs."""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
from torch import Tensor

_SPARSE_SHARE = 0.15
"""Largest share of active coordinates for which a sparse product is faster (measured on a CPU)."""

_SPARSE_SIDE = 64
"""Least height and width for a sparse product, which first transposes its dense factor (measured on a CPU)."""


class ParameterMask:
    """The active coordinates of one parameter: booleans, indices and a sparse matrix.

    Indices are computed when first needed and then cached; the sparse matrix is made by :meth:`next_matrix`.

    **Guarantee**: public and constant; another mask is another object.

    Args:
        active: booleans of the parameter's shape, on its device; True where active. It must not be written to.

    Example:
        >>> mask = ParameterMask(torch.tensor([[True, False], [False, True]]))
        >>> mask.indices.tolist(), mask.num_active
        ([0, 3], 2)
        >>> mask.select(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([1., 4.])
    """

    def __init__(self, active: Tensor) -> None:
        if active.dtype != torch.bool:
            raise TypeError(f"Expected a mask of booleans, got dtype={active.dtype}. Pass mask != 0.")
        self.active = active
        self._num_sparse_products = 0
        self._matrix: Tensor | None = None

    @cached_property
    def indices(self) -> Tensor:
        """Ascending indices of the active coordinates in the flattened parameter, shape ``(L,)``."""
        return self.active.reshape(-1).nonzero().squeeze(1)

    @property
    def num_active(self) -> int:
        """Number of active coordinates, L."""
        return self.indices.numel()

    @property
    def share(self) -> float:
        """Share of active coordinates, in [0, 1]."""
        return self.num_active / max(1, self.active.numel())

    def select(self, values: Tensor) -> Tensor:
        """Return the active entries of a tensor of the parameter's shape, ordered as ``indices``: shape ``(L,)``."""
        return values.reshape(-1)[self.indices]

    def select_rows(self, values: Tensor) -> Tensor:
        """Return the active entries of every sample, of shape (B, L), from values of shape (B, ``*shape``)."""
        return values.reshape(values.shape[0], self.active.numel()).index_select(1, self.indices)

    def next_matrix(self, dtype: torch.dtype) -> Tensor | None:
        """Return the mask as a sparse matrix for a product, or None if a dense product is faster.

        Making the matrix takes as long as a product, so the first call returns None and the second one makes it.

        Args:
            dtype: type of the matrix.

        Returns:
            A CSR matrix of shape ``(p, d)``, 1 where active; or None.
        """
        self._num_sparse_products += 1
        known = self.matrix(dtype)
        if known is not None or self._num_sparse_products < 2 or not self._is_better_sparse:
            return known
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self._matrix = self.active.to(dtype).to_sparse_csr()
        return self._matrix

    def matrix(self, dtype: torch.dtype) -> Tensor | None:
        """Return the matrix that :meth:`next_matrix` made in this dtype, or None if there is none."""
        return self._matrix if self._matrix is not None and self._matrix.dtype == dtype else None

    @cached_property
    def _is_better_sparse(self) -> bool:
        """True if a sparse product is faster: at one active entry in ten, MKL's takes two thirds of the dense time."""
        if self.active.device.type != "cpu" or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
            return False
        return self.active.dim() == 2 and min(self.active.shape) >= _SPARSE_SIDE and self.share <= _SPARSE_SHARE
