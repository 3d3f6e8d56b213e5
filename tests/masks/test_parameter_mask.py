"""The forms of a mask: booleans, indices, and a sparse matrix that is made once and only where it pays."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from lightning_dp.masks import ParameterMask

MKL = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products need MKL")


def mask_of(share: float, rows: int = 80, columns: int = 65) -> ParameterMask:
    """A mask with exactly this share of active entries."""
    active = torch.zeros(rows * columns, dtype=torch.bool)
    active[torch.randperm(active.numel())[: round(share * active.numel())]] = True
    return ParameterMask(active.view(rows, columns))


def matrices(mask: ParameterMask, times: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    return [mask.next_matrix(dtype) for _ in range(times)]


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 1, 2), (0, 4)])
def test_indices_and_selections_follow_the_booleans(shape: tuple[int, ...]) -> None:
    active, values = torch.rand(shape) < 0.5, torch.randn(shape)
    mask = ParameterMask(active)
    assert torch.equal(mask.select(values), values[active])
    assert torch.equal(mask.select_rows(torch.stack([values, -values])), torch.stack([values[active], -values[active]]))
    assert mask.num_active == int(active.sum())
    assert mask.share == pytest.approx(mask.num_active / max(1, active.numel()))
    assert mask.indices is mask.indices


def test_only_booleans_are_a_mask() -> None:
    with pytest.raises(TypeError, match=r"booleans, got dtype=torch.float32"):
        ParameterMask(torch.ones(3))


@MKL
def test_a_matrix_is_made_when_it_is_asked_for_again() -> None:
    """Making it takes as long as a product, which a mask that is used once does not repay."""
    mask = mask_of(0.1)
    assert mask.matrix(torch.float32) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second, third = matrices(mask)
    assert first is None
    assert second is not None
    assert third is second is mask.matrix(torch.float32)
    assert torch.equal(second.to_dense(), mask.active.float())
    assert mask.matrix(torch.float64) is None


@MKL
@pytest.mark.parametrize(("rows", "columns", "pays"), [(64, 64, True), (63, 640, False), (640, 63, False)])
def test_a_mask_with_a_short_side_stays_dense(rows: int, columns: int, pays: bool) -> None:
    assert [matrix is not None for matrix in matrices(mask_of(0.1, rows, columns))] == [False, pays, pays]


@MKL
@pytest.mark.parametrize(("share", "pays"), [(0.0, True), (0.15, True), (0.16, False), (1.0, False)])
def test_a_mask_with_many_active_entries_stays_dense(share: float, pays: bool) -> None:
    assert [matrix is not None for matrix in matrices(mask_of(share))] == [False, pays, pays]


def test_a_mask_of_a_kernel_stays_dense() -> None:
    assert matrices(ParameterMask(torch.zeros(64, 64, 3, dtype=torch.bool))) == [None] * 3


def test_without_mkl_products_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert matrices(mask_of(0.1)) == [None] * 3


@MKL
def test_a_mask_serves_products_of_either_type() -> None:
    mask = mask_of(0.1)
    matrices(mask, 1)
    for dtype in (torch.float32, torch.float64, torch.float32):
        (made,) = matrices(mask, 1, dtype)
        assert made is not None
        assert made.dtype == dtype
