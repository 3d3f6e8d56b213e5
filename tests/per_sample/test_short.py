"""Products of bfloat16 operands as a GPU computes them, emulated on the CPU by exact products in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.per_sample import PerSampleEngine
from lightning_dp.per_sample.rules import linear, short
from lightning_dp.per_sample.rules.base import Call
from lightning_dp.per_sample.rules.linear import LinearRule

B, T, D, P = 3, 40, 24, 32
RULE = LinearRule()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the short products that were computed."""
    found: list[torch.Size] = []

    def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        made = left.float() @ right.float()
        found.append(made.shape)
        return made if out is None else out.copy_(made)

    monkeypatch.setattr(short, "has_short_products", lambda kind: True)
    monkeypatch.setattr(short, "_product", product)
    return found


def call_of(activation: Tensor, backprop: Tensor) -> Call:
    return Call(inputs=(), kwargs={}, activation=activation, backprop=backprop)


def random_call(positions: int = T, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    activation = torch.randn(B, positions, D, generator=generator).bfloat16()
    return call_of(activation, torch.randn(B, positions, P, generator=generator).bfloat16())


def exact(calls: list[Call]) -> Tensor:
    """Per-sample gradients in float64, of the rounded activations."""
    pairs = [(call.activation.bfloat16().double(), call.backprop.double()) for call in calls]
    return sum(torch.bmm(g.reshape(B, -1, P).mT, a.reshape(B, -1, D)) for a, g in pairs)  # type: ignore[return-value]


def lengths(calls: list[Call]) -> Tensor:
    """Sums of the lengths of all terms of each sample."""
    return sum((call.activation.double().norm(dim=-1) * call.backprop.double().norm(dim=-1)).sum(1) for call in calls)  # type: ignore[return-value]


def norms_of(calls: list[Call]) -> Tensor:
    return RULE.squared_norms(nn.Linear(D, P), calls, B, {"weight"})["weight"].sqrt()


def weighted_sum(calls: list[Call], factors: Tensor) -> Tensor:
    out = {"weight": torch.zeros(P, D)}
    RULE.add_weighted_sum(nn.Linear(D, P), calls, factors, B, out)
    return out["weight"]


def test_products_are_widened_where_the_device_has_none() -> None:
    call = random_call()
    assert not short.is_short(call.backprop)
    assert [each.dtype for each in short.operands(call.activation, call.backprop, short=False)] == [torch.float32] * 2
    torch.testing.assert_close(weighted_sum([call], torch.ones(B)).double(), exact([call]).sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_calls", [1, 2])
@pytest.mark.parametrize("gram", [True, False])
def test_short_norms_lose_nothing(
    emulated: list[torch.Size], monkeypatch: pytest.MonkeyPatch, num_calls: int, gram: bool
) -> None:
    """A norm is the exact one, and at most the stated errors above it."""
    monkeypatch.setattr("lightning_dp.per_sample.rules.outer_products.prefer_gram", lambda *sizes: gram)
    calls = [random_call(seed=seed) for seed in range(num_calls)]
    norms, expected = norms_of(calls).double(), exact(calls).flatten(1).norm(dim=1)
    assert emulated
    assert bool((norms >= expected * (1 - 1e-6)).all())
    assert bool((norms <= expected + 1e-4 * lengths(calls)).all())


def test_short_gradients_are_those_of_the_rounded_activation(emulated: list[torch.Size]) -> None:
    """Under autocast a layer is given float32, and multiplies what it has rounded."""
    call = random_call()
    call = call_of(call.activation.float() * 1.001, call.backprop)
    made = RULE.per_sample(nn.Linear(D, P), [call], B, {"weight"})["weight"]
    assert emulated == [(B, P, D)]
    torch.testing.assert_close(made.double(), exact([call]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_clipping_factors_keep_their_bits(emulated: list[torch.Size], wide: bool) -> None:
    """The sum is off by at most 2^-16 S; factors rounded once would put it off by a hundred times as much."""
    call = random_call()
    factors = torch.tensor([0.3, 1 / 7, 0.0])
    expected = torch.einsum("b,bpd->pd", factors.double(), exact([call]))
    bound = float((factors.double() * lengths([call])).sum())
    if wide:  # the other operand is scaled
        out = torch.zeros(D, P)
        short.add_weighted_product(out, call.activation, call.backprop, factors)
        found = out.mT
    else:
        found = weighted_sum([call], factors)
    assert float((found.double() - expected).norm()) < (short.SPLIT_ERROR + 1e-6) * bound
    rounded = (call.backprop.float() * factors[:, None, None]).bfloat16().double()
    once = torch.einsum("btp,btd->pd", rounded, call.activation.double())
    assert float((once - expected).norm()) > 20 * float((found.double() - expected).norm())


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("positions", [3, 42, 402])
def test_cancelling_terms_stay_within_their_norm(
    emulated: list[torch.Size], monkeypatch: pytest.MonkeyPatch, gram: bool, positions: int
) -> None:
    """Terms of 3, 5 and -8 times a vector of few bits add up to zero, so norm and sum are nothing but rounding."""
    monkeypatch.setattr("lightning_dp.per_sample.rules.outer_products.prefer_gram", lambda *sizes: gram)
    generator, num = torch.Generator().manual_seed(0), positions // 3
    vectors = torch.randint(-31, 32, (B, num, D), generator=generator).float().repeat_interleave(3, 1)
    activation = (vectors * torch.tensor([3.0, 5.0, -8.0]).repeat(num)[:, None]).bfloat16()  # is what is scaled
    backprop = torch.randn(B, num, P, generator=generator).bfloat16().repeat_interleave(3, 1)
    call = call_of(activation, backprop)
    assert not bool(exact([call]).any())
    norms, largest = norms_of([call]), 0.0
    for factor in torch.linspace(0.1, 0.9, 9).tolist():
        for sample in range(B):
            factors = torch.zeros(B)
            factors[sample] = factor / norms[sample]
            length = float(weighted_sum([call], factors).double().norm())
            assert length <= factor * (1 + 1e-5)
            largest = max(largest, length)
    assert largest > 0


def test_layers_used_in_two_types_are_widened(emulated: list[torch.Size]) -> None:
    calls = [random_call(), call_of(*(each.float() for each in (random_call(seed=1).activation, torch.ones(B, T, P))))]
    norms_of(calls)
    weighted_sum(calls, torch.ones(B))
    assert not emulated


def test_one_position_is_widened(emulated: list[torch.Size]) -> None:
    call = random_call(1)
    call = call_of(call.activation[:, 0], call.backprop[:, 0])
    norms, expected = norms_of([call]), exact([call]).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=0)
    factors = (0.37 / norms) * torch.tensor([0.0, 1.0, 0.0])
    assert float(weighted_sum([call], factors).norm()) <= 0.37 * (1 + 1e-5)
    assert not emulated


def test_short_layers_prefer_gram_matrices_to_kept_gradients(
    emulated: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call_of(torch.zeros(B, T, 200).bfloat16(), torch.zeros(B, T, 200).bfloat16())
    monkeypatch.setattr(linear, "prefer_kept", lambda *sizes: True)
    assert not RULE.materialises(nn.Linear(200, 200), [call], B, "weight")
    assert RULE.materialises(nn.Linear(D, P), [random_call()], B, "weight")  # small: the gradients cost less


def test_engine_under_autocast_multiplies_in_bfloat16(emulated: list[torch.Size]) -> None:
    """The sum of all samples is autograd's, to the rounding of autograd's own product."""
    torch.manual_seed(0)
    module: Any = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, P), nn.GELU(), nn.Linear(P, D))
    x = torch.randn(B, T, D)

    def loss(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = module(rows)
        return out.float().square().flatten(1).sum(1).sum()

    parameters = dict(module.named_parameters())
    engine = PerSampleEngine(module)
    engine.attach()
    engine.set_parameters(parameters)
    engine.learn_layout(lambda size: loss(x[:1].repeat(size, 1, 1)), (2, 3))
    engine.begin(B)
    loss(x).backward()
    norms = engine.squared_norms([list(parameters)])[0].sqrt()
    out = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    engine.accumulate(torch.ones(1, B), [list(parameters)], out)
    grads = engine.per_sample_gradients()
    engine.end()
    engine.detach()
    assert emulated
    loss(x).backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert float((out[name] - parameter.grad).norm()) < 2**-7 * float(parameter.grad.norm())
    whole = torch.cat([grad.flatten(1) for grad in grads.values()], 1).norm(dim=1)
    torch.testing.assert_close(norms, whole, rtol=1e-3, atol=0)
