"""Sparse matrices whose values are functions of parameters: they are made dense, since torch reports none of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.tracking.nodes import is_tracked
from lightning_dp.system.torch_private import sparse_sum

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker

_LARGEST = 2**22
"""Most entries of a matrix that is made dense."""


class DenseMatrices(AbstractContextManager[None]):
    """A context in which ``torch.sparse_coo_tensor`` of tracked values returns a dense function of parameters."""

    def __enter__(self) -> None:
        self._before: Callable[..., Tensor] = torch.sparse_coo_tensor
        torch.sparse_coo_tensor = self._made

    def __exit__(self, *error: object) -> None:
        torch.sparse_coo_tensor = self._before

    def _made(self, indices: Any, values: Any = None, size: Any = None, **options: Any) -> Tensor:
        given = (indices,) if values is None else (indices, values) if size is None else (indices, values, size)
        if is_tracked(values) and size is not None and math.prod(size) <= _LARGEST:
            at = torch.as_tensor(indices, device=values.device)
            empty = torch.zeros(tuple(size), dtype=options.get("dtype") or values.dtype, device=values.device)
            made = empty.index_put(tuple(at.unbind()), values.to(empty.dtype), accumulate=True)
            if is_tracked(made):
                return made
        return self._before(*given, **options)


def _same(tracker: Tracker, func: Any, matrix: Any, *args: Any, **kwargs: Any) -> Any:
    return matrix


def _summed(tracker: Tracker, func: Any, matrix: Any, *args: Any, **kwargs: Any) -> Any:
    return matrix.sum(*args, **kwargs)


def _refuse(tracker: Tracker, func: Any, *args: Any, **kwargs: Any) -> Any:
    raise PrivacyError(
        f"Expected dense functions of private parameters, got one that {func.__name__} takes for a sparse one. Use its "
        f"values before they are put into a matrix; {WAY_OUT}."
    )


_SPARSE_ONLY = "indices _indices values _values _nnz is_coalesced sparse_dim dense_dim to_sparse_csr to_sparse_csc"
_FUNCTIONS = (torch.sparse.softmax, torch.sparse.log_softmax, torch.sparse.addmm, torch.hspmm, torch.sspaddmm)
HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.coalesce, Tensor.to_dense, Tensor.to_sparse), _same),
    **{getattr(Tensor, name): _refuse for name in _SPARSE_ONLY.split()},
    **dict.fromkeys(_FUNCTIONS, _refuse),
    sparse_sum: _summed,
}
"""What becomes of operations on sparse matrices alone, given a dense function of parameters."""
