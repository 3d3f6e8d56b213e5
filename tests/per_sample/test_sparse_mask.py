"""A mask as a sparse matrix: the same norms, made once, remade when it changes, and not made where it does not pay."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor

from lightning_dp.per_sample.rules import sparse_mask
from lightning_dp.per_sample.rules.sparse_mask import masked_outer_squared_norm, sparse_of

FEW = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products need MKL")


def mask_of(share: float, rows: int = 80, columns: int = 65) -> Tensor:
    """So large a share of live entries, to the entry."""
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[torch.randperm(mask.numel())[: round(share * mask.numel())]] = True
    return mask.view(rows, columns)


@FEW
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.15, 0.5, 1.0])
def test_sparse_and_dense_products_agree(share: float, size: int, dtype: torch.dtype) -> None:
    mask, lefts, rights = mask_of(share), torch.rand(size, 80, dtype=dtype), torch.rand(size, 65, dtype=dtype)
    expected = torch.einsum("bp,pd,bd->b", lefts, mask.to(dtype), rights)
    for _ in range(3):
        torch.testing.assert_close(masked_outer_squared_norm(mask, lefts, rights), expected)
    assert (sparse_of(mask, dtype) is not None) == (share <= 0.15)


@FEW
def test_a_matrix_is_made_once_and_only_for_a_mask_that_is_met_again() -> None:
    mask = mask_of(0.1)
    assert sparse_of(mask, torch.float32) is None
    made = sparse_of(mask, torch.float32)
    assert made is not None
    assert sparse_of(mask, torch.float32) is made
    assert torch.equal(made.to_dense(), mask.float())
    assert sparse_of(mask.clone(), torch.float32) is None


@FEW
@pytest.mark.parametrize(("rows", "columns", "pays"), [(64, 64, True), (63, 640, False), (640, 63, False)])
def test_a_mask_with_a_short_side_stays_dense(rows: int, columns: int, pays: bool) -> None:
    mask = mask_of(0.1, rows, columns)
    assert [sparse_of(mask, torch.float32) is not None for _ in range(3)] == [False, pays, pays]


@FEW
def test_a_mask_that_was_changed_in_place_is_a_new_one() -> None:
    mask = mask_of(0.1)
    for _ in range(2):
        sparse_of(mask, torch.float32)
    mask.logical_not_()
    assert sparse_of(mask, torch.float32) is None
    assert sparse_of(mask, torch.float32) is None  # too many live entries now
    mask.logical_not_()
    sparse_of(mask, torch.float32)
    again = sparse_of(mask, torch.float32)
    assert again is not None
    assert torch.equal(again.to_dense(), mask.float())


@FEW
def test_a_matrix_ends_with_its_mask_and_nothing_is_said() -> None:
    before, mask = len(sparse_mask._known), mask_of(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            sparse_of(mask, torch.float64)
    assert len(sparse_mask._known) == before + 1
    del mask
    gc.collect()
    assert len(sparse_mask._known) == before


@FEW
def test_what_is_not_finite_counts_where_it_is_live_only() -> None:
    mask, lefts, rights = mask_of(0.1), torch.rand(3, 80), torch.rand(3, 65)
    row, column = mask.nonzero()[0].tolist()
    mask[:, (column + 1) % 65] = False
    rights[0, column], rights[1, (column + 1) % 65], lefts[2, row] = torch.inf, torch.inf, torch.nan
    for _ in range(2):
        norms = masked_outer_squared_norm(mask, lefts, rights)
    assert norms.isfinite().tolist() == [False, True, False]


def test_without_mkl_products_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    mask = mask_of(0.1)
    assert [sparse_of(mask, torch.float32) for _ in range(3)] == [None] * 3


def test_a_mask_without_a_version_is_used_as_it_is() -> None:
    with torch.inference_mode():
        mask = mask_of(0.1)
    assert [sparse_of(mask, torch.float32) for _ in range(3)] == [None] * 3


@FEW
def test_a_mask_serves_inputs_of_either_type() -> None:
    mask = mask_of(0.1)
    sparse_of(mask, torch.float32)
    for dtype in (torch.float32, torch.float64, torch.float32):
        made = sparse_of(mask, dtype)
        assert made is not None
        assert made.dtype == dtype
