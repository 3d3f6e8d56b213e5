"""Linear layers at any number of positions, and the equalities their cheap norms rest on."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_dp.per_sample.rules.base import BLOCK_ELEMENTS, Call
from lightning_dp.per_sample.rules.linear import LinearRule
from lightning_dp.per_sample.rules.outer_products import gram_squared_norm, outer_squared_norm, prefer_gram
from tests.helpers import Largest
from tests.per_sample.checks import assert_engine_agrees, parameter_masks, weighted_sum
from tests.per_sample.rule_cases import Conv1D


def _loss(module: nn.Module):
    return lambda x: module(x).square().flatten(1).sum(1)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (4, 3), (2, 3, 3), (40, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"grad_sample": "materialize"}, {"memory": "lean"}])
@pytest.mark.one_in(2)
def test_linear_agrees_with_batches_of_one(shape: tuple[int, ...], bias: bool, options: dict) -> None:
    module = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias)).double()
    data = torch.randn(6, *shape, dtype=torch.float64)
    for size in (0, 1, 6):
        assert_engine_agrees(module, _loss(module), data, size=size, **options)


@pytest.mark.parametrize("shape", [(3,), (4, 3)])
@pytest.mark.parametrize("options", [{}, {"grad_sample": "materialize"}, {"memory": "lean"}])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_hidden_width_of_zero_agrees(shape: tuple[int, ...], options: dict) -> None:
    """As ``AdaptiveLogSoftmaxWithLoss`` has it where its width is smaller than powers of ``div_value``."""
    module = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)).double()
    for size in (0, 1, 6):
        assert_engine_agrees(module, _loss(module), torch.randn(6, *shape, dtype=torch.float64), size=size, **options)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([1, 100, 2**19]),
)
def test_linear_rule_speaks_of_one_gradient(
    batch: int, rows: int, positions: int, num_in: int, num_out: int, two_calls: bool, block: int
) -> None:
    """Norms, masked norms and sums are those of the materialised gradients, with folded rows and several calls."""
    with mock.patch.dict(BLOCK_ELEMENTS, cpu=block):
        assert_one_gradient(batch, rows, positions, num_in, num_out, two_calls)


def assert_one_gradient(batch: int, rows: int, positions: int, num_in: int, num_out: int, two_calls: bool) -> None:
    layer = nn.Linear(num_in, num_out).double()
    calls = [
        Call(
            (),
            {},
            torch.randn(batch * rows, positions, num_in, dtype=torch.float64),
            torch.randn(batch * rows, positions, num_out, dtype=torch.float64),
            rows,
        )
        for _ in range(1 + two_calls)
    ]
    rule = LinearRule()
    names = {"weight", "bias"}
    grads = rule.per_sample(layer, calls, batch, names)
    expected = sum(
        torch.einsum("btp,btd->bpd", c.backprop.reshape(batch, -1, num_out), c.activation.reshape(batch, -1, num_in))
        for c in calls
    )
    torch.testing.assert_close(grads["weight"], expected)
    norms = rule.squared_norms(layer, calls, batch, names)
    factors = torch.rand(batch, dtype=torch.float64)
    sums = weighted_sum(rule, layer, calls, factors, batch, names)
    masks = {"weight": torch.rand(num_out, num_in) < 0.5, "bias": torch.rand(num_out) < 0.5}
    masked = rule.masked_squared_norms(layer, calls, batch, parameter_masks(masks))
    for name, grad in grads.items():
        torch.testing.assert_close(norms[name], grad.square().flatten(1).sum(1))
        torch.testing.assert_close(masked[name], (grad * masks[name]).square().flatten(1).sum(1))
        torch.testing.assert_close(sums[name], torch.tensordot(factors, grad, 1))


@pytest.mark.parametrize("width", [24, 128])  # norms from products and from Gram matrices
def test_norms_of_many_calls_join_a_few_samples_at_a_time(width: int) -> None:
    size, positions, names = 4096 // width, 32, {"weight", "bias"}
    layer = nn.Linear(width, width)
    calls = [Call((), {}, torch.randn(size, width), torch.randn(size, width)) for _ in range(positions)]
    masks = parameter_masks({name: torch.rand(p.shape) < 0.5 for name, p in layer.named_parameters()})
    rule, block = LinearRule(), 2**15
    assert prefer_gram(positions, width, width) == (width == 128)
    assert size * positions * width > 2 * block
    with mock.patch.dict(BLOCK_ELEMENTS, cpu=block), Largest() as largest:
        assert torch.stack(list(rule.squared_norms(layer, calls, size, names).values())).isfinite().all()
        assert torch.stack(list(rule.masked_squared_norms(layer, calls, size, masks).values())).isfinite().all()
        assert size * width <= largest.elements <= block


def test_prefer_gram_follows_the_multiplications() -> None:
    assert prefer_gram(4, 100, 100)
    assert not prefer_gram(60, 100, 100)


@pytest.mark.parametrize("positions", [1, 127, 128, 129, 300])
def test_gram_norm_over_blocks_of_positions(positions: int) -> None:
    a, g = (torch.randn(3, positions, width, dtype=torch.float64) for width in (5, 4))
    torch.testing.assert_close(gram_squared_norm(a, g), torch.bmm(g.mT, a).square().sum((1, 2)))


def test_gram_norm_of_cancelling_terms_is_not_too_small() -> None:
    """In float32 a sum that cancels to its rounding may come out 0 or negative; the bound keeps it sound."""
    torch.manual_seed(0)
    a = torch.randn(1, 1, 50).repeat(200, 2, 1)
    g = torch.randn(200, 1, 20) * 100
    g = torch.cat([g, -g * (1 + 3e-4 * torch.rand(200, 1, 1))], dim=1)
    true = torch.bmm(g.double().mT, a.double()).square().sum((1, 2))
    got = gram_squared_norm(a, g).double()
    assert (got >= 0.5 * true).all()


def test_norm_counts_squares_that_vanish_next_to_huge_ones() -> None:
    a = torch.full((1, 4), 1e-24)
    g = torch.full((1, 4), 1e19)
    true = float((a.double().square().sum() * g.double().square().sum()).item())
    assert float(outer_squared_norm(a, g)) >= true
    assert float(outer_squared_norm(a, torch.zeros(1, 4))) == 0.0


@pytest.mark.parametrize("huge", ["inputs", "backprops"])
def test_a_sample_with_a_huge_factor_is_not_finite_under_a_mask(huge: str) -> None:
    """The squares next to it may have vanished: its norm is unknown."""
    sides = {"inputs": torch.full((2, 4), 1e-24), "backprops": torch.full((2, 3), 1e-24)}
    sides[huge][1] = 1e17
    call = Call((sides["inputs"],), {}, sides["inputs"], sides["backprops"])
    mask = parameter_masks({"weight": torch.ones(3, 4, dtype=torch.bool)})
    norms = LinearRule().masked_squared_norms(nn.Linear(4, 3), [call], 2, mask)["weight"]
    assert norms.isfinite().tolist() == [True, False]


def test_weighted_sum_ignores_broken_rows_of_factor_zero() -> None:
    module = nn.Linear(3, 2)
    data = torch.randn(4, 3)
    data[1] = torch.inf
    data[2] = torch.nan
    from tests.per_sample.checks import make_engine, run_batch, stack

    engine = make_engine(module, _loss(module), torch.randn(4, 3))
    run_batch(engine, _loss(module), data, 4)
    norms = engine.squared_norms([["weight", "bias"]])
    assert norms.isfinite().tolist() == [[True, False, False, True]]
    out = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    engine.accumulate(torch.tensor([[1.0, 0.0, 0.0, 0.5]]), [["weight", "bias"]], out)
    engine.end()
    run_batch(engine, _loss(module), stack(data, [0, 3]), 2)
    clean = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    engine.accumulate(torch.tensor([[1.0, 0.5]]), [["weight", "bias"]], clean)
    for name in out:
        torch.testing.assert_close(out[name], clean[name])


@pytest.mark.parametrize("shape", [(3,), (7, 3)])
def test_transposed_linear_of_gpt2(shape: tuple[int, ...]) -> None:
    module = nn.Sequential(Conv1D(5, 3), nn.ReLU(inplace=True), Conv1D(2, 5)).double()
    engine = assert_engine_agrees(module, _loss(module), torch.randn(5, *shape, dtype=torch.float64))
    assert {type(source.rule) for source in engine._tracker.sources.values()} == {LinearRule}


def test_subclasses_are_followed_by_what_they_compute() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Standardised(nn.Conv1d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    patched = nn.Linear(4, 3)
    patched.forward = lambda x: x @ patched.weight.T.tanh()
    module = nn.Sequential(Scaled(3, 4), nn.Tanh(), Standardised(2, 2, 1), patched).double()
    patched.bias.requires_grad_(False)
    assert_engine_agrees(module, _loss(module), torch.randn(5, 2, 3, dtype=torch.float64))
