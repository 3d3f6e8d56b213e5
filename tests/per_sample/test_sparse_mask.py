"""A mask as a sparse matrix: the same norms, made once, remade when it changes, and not made where it does not pay."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.per_sample.rules import linear, sparse_mask
from lightning_dp.per_sample.rules.base import Call
from lightning_dp.per_sample.rules.linear import LinearRule
from lightning_dp.per_sample.rules.sparse_mask import masked_outer_squared_norm, masked_outer_sum, sparse_of
from tests.per_sample.checks import make_engine, run_batch

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
    expected = torch.einsum("bp,pd,bd->b", lefts.square(), mask.to(dtype), rights.square())
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


@FEW
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_sum_has_the_live_entries_of_the_dense_one(size: int, dtype: torch.dtype) -> None:
    """Once the matrix is there, which the norms make; a mask that changed has none."""
    mask, lefts, rights = mask_of(0.1), torch.randn(size, 80, dtype=dtype), torch.randn(size, 65, dtype=dtype)
    factors = torch.rand(size)
    assert masked_outer_sum(mask, lefts, rights, factors) is None
    for _ in range(2):
        sparse_of(mask, dtype)
    expected = torch.einsum("b,bp,bd->pd", factors.to(dtype), lefts, rights)[mask]
    torch.testing.assert_close(masked_outer_sum(mask, lefts, rights, factors), expected)
    assert masked_outer_sum(mask, lefts.to(torch.float16), rights.to(torch.float16), factors) is None
    mask.logical_not_()
    assert masked_outer_sum(mask, lefts, rights, factors) is None


@FEW
@pytest.mark.parametrize("dead", [False, True])
def test_a_layer_adds_live_entries_only(dead: bool) -> None:
    """As the dense product does where the mask is met for the first time; a sample of factor 0 may hold anything."""
    width, height = 70, 90
    layer = nn.Linear(width, height).double()
    rule = LinearRule()
    activation, backprop = torch.randn(6, width, dtype=torch.float64), torch.randn(6, height, dtype=torch.float64)
    factors = torch.rand(6)
    mask = mask_of(0.1, height, width)
    if dead:
        factors[2], activation[2], backprop[2] = 0.0, 0.0, 0.0
    call = Call((activation,), {}, activation, backprop)
    out = {"weight": torch.ones(int(mask.sum()), dtype=torch.float64)}
    assert rule.add_live_entries(layer, [call], factors, 6, out, {"weight": mask}) == set()
    for _ in range(2):
        rule.masked_squared_norms(layer, [call], 6, {"weight": mask})
    assert rule.add_live_entries(layer, [call, call], factors, 6, out, {"weight": mask}) == set()
    assert rule.add_live_entries(layer, [call], factors, 6, out, {"weight": mask}) == {"weight"}
    two = Call((), {}, activation.reshape(3, 2, width), backprop.reshape(3, 2, height))  # positions of three samples
    assert rule.add_live_entries(layer, [two], factors[:3], 3, out, {"weight": mask}) == set()
    product = torch.einsum("b,bp,bd->pd", factors.double(), backprop, activation)
    torch.testing.assert_close(out["weight"] - 1, product[mask])


@FEW
@pytest.mark.parametrize("materialise", [False, True])
def test_live_entries_of_a_batch_with_a_bad_sample(materialise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor of 0 drops it, whatever it holds: the live entries are those of the batch without it, from the second step on.

    Where gradients are kept they are what is summed up.
    """
    module = nn.Sequential(nn.Linear(70, 90), nn.ReLU(), nn.Linear(90, 3))
    data, names = torch.randn(5, 70), [name for name, _ in module.named_parameters()]

    def loss(batch: Tensor) -> Tensor:
        return module(batch).square().sum(1)

    engine = make_engine(module, loss, data, grad_sample="materialize" if materialise else "auto")
    masks = {name: mask_of(0.1, *p.shape) if p.dim() == 2 else p.detach() > 0 for name, p in module.named_parameters()}
    places = {name: mask.flatten().nonzero().squeeze(1) for name, mask in masks.items()}
    for _ in range(2):
        sparse_of(masks["0.weight"], torch.float32)
    found = []
    monkeypatch.setattr(linear, "masked_outer_sum", lambda *args: (found.append(masked_outer_sum(*args)), found[-1])[1])
    for _ in range(2):
        run_batch(engine, loss, data[:4], 4)
        assert engine.squared_norms([names], masks).isfinite().all()
        expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        engine.accumulate(torch.full((1, 4), 0.5), [names], expected)
        engine.end()
        bad = data.clone()
        bad[4] = torch.nan
        run_batch(engine, loss, bad, 5)
        assert engine.squared_norms([names], masks).isfinite().tolist() == [[True] * 4 + [False]]
        rows = {name: torch.zeros(len(positions)) for name, positions in places.items()}
        engine.accumulate(torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.0]]), [names], rows, masks, places)
        for name in names:
            torch.testing.assert_close(rows[name], expected[name].flatten()[places[name]])
        engine.end()
    assert any(entries is not None for entries in found) != materialise
