"""Products under masks: sparse and dense ones agree, and only active entries are added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.per_sample.rules import linear
from lightning_dp.per_sample.rules.base import Call
from lightning_dp.per_sample.rules.linear import LinearRule
from lightning_dp.per_sample.rules.outer_products import masked_outer_squared_norm, masked_outer_sum
from tests.masks.test_parameter_mask import MKL, mask_of
from tests.per_sample.checks import make_engine, parameter_masks, rows_for, run_batch


@MKL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.15, 0.5, 1.0])
def test_sparse_and_dense_products_agree(share: float, size: int, dtype: torch.dtype) -> None:
    mask, lefts, rights = mask_of(share), torch.rand(size, 80, dtype=dtype), torch.rand(size, 65, dtype=dtype)
    expected = torch.einsum("bp,pd,bd->b", lefts.square(), mask.active.to(dtype), rights.square())
    for _ in range(3):
        torch.testing.assert_close(masked_outer_squared_norm(mask, lefts, rights), expected)
    assert (mask.matrix(dtype) is not None) == (share <= 0.15)


@MKL
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e30])
def test_a_vector_that_is_not_finite_makes_its_norm_so(bad: float) -> None:
    """Also a huge one: squares of the other vector may have vanished."""
    mask, lefts, rights = mask_of(0.1), torch.rand(3, 80), torch.rand(3, 65)
    rights[0, 5], lefts[2, 7] = bad, bad
    for _ in range(3):
        assert masked_outer_squared_norm(mask, lefts, rights).isfinite().tolist() == [False, True, False]


@MKL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_sum_has_the_active_entries_of_the_dense_one(size: int, dtype: torch.dtype) -> None:
    """Once the matrix is there, which the norms make."""
    mask, lefts, rights = mask_of(0.1), torch.randn(size, 80, dtype=dtype), torch.randn(size, 65, dtype=dtype)
    factors = torch.rand(size)
    assert masked_outer_sum(mask, lefts, rights, factors) is None
    for _ in range(2):
        mask.next_matrix(dtype)
    expected = torch.einsum("b,bp,bd->pd", factors.to(dtype), lefts, rights)[mask.active]
    torch.testing.assert_close(masked_outer_sum(mask, lefts, rights, factors), expected)
    assert masked_outer_sum(mask, lefts.to(torch.float16), rights.to(torch.float16), factors) is None


@MKL
@pytest.mark.parametrize("dead", [False, True])
def test_a_layer_adds_active_entries_only(dead: bool) -> None:
    """As the dense product does where the mask is used for the first time; a sample of factor 0 may hold anything."""
    width, height = 70, 90
    layer = nn.Linear(width, height).double()
    rule = LinearRule()
    activation, backprop = torch.randn(6, width, dtype=torch.float64), torch.randn(6, height, dtype=torch.float64)
    factors = torch.rand(6)
    mask = mask_of(0.1, height, width)
    if dead:
        factors[2], activation[2], backprop[2] = 0.0, 0.0, 0.0
    call = Call((activation,), {}, activation, backprop)
    out = {"weight": torch.ones(mask.num_active, dtype=torch.float64)}
    assert rule.add_active_entries(layer, [call], factors, 6, out, {"weight": mask}) == set()
    for _ in range(2):
        rule.masked_squared_norms(layer, [call], 6, {"weight": mask})
    assert rule.add_active_entries(layer, [call, call], factors, 6, out, {"weight": mask}) == set()
    assert rule.add_active_entries(layer, [call], factors, 6, out, {"weight": mask}) == {"weight"}
    two = Call((), {}, activation.reshape(3, 2, width), backprop.reshape(3, 2, height))  # positions of three samples
    assert rule.add_active_entries(layer, [two], factors[:3], 3, out, {"weight": mask}) == set()
    product = torch.einsum("b,bp,bd->pd", factors.double(), backprop, activation)
    torch.testing.assert_close(out["weight"] - 1, product[mask.active])


@MKL
@pytest.mark.parametrize("materialise", [False, True])
def test_active_entries_of_a_batch_with_a_bad_sample(materialise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor of 0 drops it, whatever it holds: the rest is as in the batch without it, from the second step on.

    Where gradients are cached, they are what is added.
    """
    module = nn.Sequential(nn.Linear(70, 90), nn.ReLU(), nn.Linear(90, 3))
    data, names = torch.randn(5, 70), [name for name, _ in module.named_parameters()]

    def loss(batch: Tensor) -> Tensor:
        return module(batch).square().sum(1)

    engine = make_engine(module, loss, data, grad_sample="materialize" if materialise else "auto")
    masks = parameter_masks({name: p.detach() > 0 for name, p in module.named_parameters() if p.dim() == 1})
    masks |= {name: mask_of(0.1, *p.shape) for name, p in module.named_parameters() if p.dim() == 2}
    for _ in range(2):
        masks["0.weight"].next_matrix(torch.float32)
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
        rows = rows_for(masks)
        engine.accumulate(torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.0]]), [names], rows, masks)
        for name in names:
            torch.testing.assert_close(rows[name], masks[name].select(expected[name]))
        engine.end()
    assert any(entries is not None for entries in found) != materialise
