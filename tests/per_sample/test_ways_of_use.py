"""Parameters used in any way, as a function of parameters and samples says it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.per_sample.checks import assert_engine_agrees
from tests.per_sample.ways_of_use import Uses, _data, _loss, drawn


def hooked(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: 0.5 * gradient)
    return x


def set_rows(x: Tensor, where: Any, value: Tensor) -> Tensor:
    x = x.clone()
    x[where] = value
    return x


def scanned(m: Any, x: Tensor) -> Tensor:
    """A selective state space, time by time."""
    state, rate = x.new_zeros(len(x), 3, 2), F.softplus(m.layer(x))
    found = []
    for t in range(x.shape[1]):
        state = (-rate[:, t, :, None] * m.decay.exp()).exp() * state + (rate[:, t] * x[:, t])[..., None]
        found.append(state.sum(-1) + x[:, t] * m.skip)
    return torch.stack(found, 1)


EACH = torch.arange(4)


#: what a network may do with bare parameters; input (B, 4, 3)
def _copy_changed_in_place(m: Any, x: Tensor) -> Tensor:
    copied = m.w.clone()
    before = nn.functional.linear(x, copied)
    copied[0].mul_(2.0)
    return before * nn.functional.linear(x, copied)


def _changed_in_place(m: Any, x: Tensor) -> Tensor:
    first = m.w * 2
    before = x * first
    first.mul_(m.w)
    return before + x.sin() * first + x.cos() * (m.w * 2)


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ensemble by a map over stacked matrices": (
        lambda m, x: torch.vmap(lambda w, b: F.linear(x, w, b).tanh(), (0, 1))(m.w, m.b * 2).sum(0),
        {"w": drawn(4, 3, 3), "b": drawn(3, 4)},
    ),
    "functional head": (
        lambda m, x: F.linear(x, m.layer.weight.t() @ m.layer.weight),
        {"layer": nn.Linear(3, 3, bias=False)},
    ),
    "product from the left": (lambda m, x: m.w @ x, {"w": drawn(2, 4)}),
    "product with a vector": (lambda m, x: x @ m.w, {"w": drawn(3)}),
    "einsum": (lambda m, x: torch.einsum("btd,hde->bhte", x, m.w), {"w": drawn(2, 3, 2)}),
    "stacked products": (lambda m, x: x.unsqueeze(1) @ m.w, {"w": drawn(2, 3, 2)}),
    "chunks": (
        lambda m, x: sum(F.linear(x, *pair) for pair in zip(m.w.chunk(3), m.b.chunk(3), strict=True)),
        {"w": drawn(6, 3), "b": drawn(6)},
    ),
    "weight and bias in one table": (lambda m, x: F.linear(x, m.w[:3], m.w[3]), {"w": drawn(4, 3)}),
    "overlapping slices": (lambda m, x: F.linear(x, m.w[:3]) + F.linear(x.sin(), m.w[1:]), {"w": drawn(4, 3)}),
    "one slice twice": (lambda m, x: x @ m.w[0] + x.sin() @ m.w[0], {"w": drawn(2, 3, 3)}),
    "low-rank product": (lambda m, x: F.linear(x, m.b @ m.a), {"a": drawn(2, 3), "b": drawn(4, 2)}),
    "changed in place after a use": (_changed_in_place, {"w": drawn(3)}),
    "copy changed in place through a view": (_copy_changed_in_place, {"w": drawn(3, 3)}),
    "one function of several numbers": (
        lambda m, x: sum(x.sin() * (m.w**n).exp() for n in (1, 2, 1, 3, 2)) + x * m.w.pow(2) + x * torch.pow(2, m.w),
        {"w": drawn(3)},
    ),
    "normalised weight": (lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.w, dim=-1)), {"w": drawn(4, 3)}),
    "gated weight": (lambda m, x: F.linear(x, m.w * m.gate.sigmoid()), {"w": drawn(4, 3), "gate": drawn(4, 3)}),
    "noise of a learned scale": (
        lambda m, x: F.linear(x, m.w + m.s.exp() * torch.ones_like(m.w)),
        {"w": drawn(4, 3), "s": drawn(4, 3)},
    ),
    "softmax of weights": (
        lambda m, x: (torch.stack([x, x.sin()]) * m.w.softmax(0)[:, None, None, None]).sum(0),
        {"w": drawn(2)},
    ),
    "weights one by one": (lambda m, x: sum(x @ w for w in m.w), {"w": drawn(2, 3, 3)}),
    "scale in a distribution": (
        lambda m, x: -torch.distributions.Normal(m.mean, m.scale.exp()).log_prob(x),
        {"mean": drawn(3), "scale": drawn(3)},
    ),
    "full covariance": (
        lambda m, x: -torch.distributions.MultivariateNormal(m.mean, scale_tril=m.tril.tril()).log_prob(x),
        {"mean": drawn(3), "tril": torch.eye(3) + 0.1},
    ),
    "position table": (lambda m, x: x + m.table(EACH), {"table": nn.Embedding(7, 3)}),
    "position table with axes": (
        lambda m, x: x + m.table(EACH[None]).transpose(0, 1).transpose(0, 1),
        {"table": nn.Embedding(7, 3)},
    ),
    "layers on positions": (
        lambda m, x: x + m.norm(m.table(EACH)),
        {"table": nn.Embedding(7, 3), "norm": nn.LayerNorm(3)},
    ),
    "relative positions": (
        lambda m, x: x @ x.mT + m.bias[(EACH[:, None] - EACH)].permute(2, 0, 1)[0],
        {"bias": drawn(7, 2)},
    ),
    "interpolated positions": (lambda m, x: x + F.interpolate(m.p, size=3, mode="linear"), {"p": drawn(1, 4, 2)}),
    "basis of constants": (lambda m, x: (x.unsqueeze(-1) * F.softplus(m.w).cumsum(-1)).sum(-1), {"w": drawn(3, 2)}),
    "tokens repeated in many ways": (
        lambda m, x: torch.cat(
            [
                m.a.expand(len(x), -1, -1),
                m.b.repeat(len(x), 1, 1),
                m.b.tile(len(x), 1, 1),
                torch.stack([m.c] * len(x)),
                x,
            ],
            1,
        ),
        {"a": drawn(1, 1, 3), "b": drawn(1, 2, 3), "c": drawn(1, 3)},
    ),
    "rows repeated for every sample": (
        lambda m, x: (m.w.repeat(len(x), 1) * x.flatten(0, 1)).view(x.shape),
        {"w": drawn(4, 3)},
    ),
    "token written into the samples": (lambda m, x: set_rows(x, (slice(None), 0), m.w), {"w": drawn(3)}),
    "masked by a token": (lambda m, x: set_rows(x, x[..., 0] > 0, m.w), {"w": drawn(3)}),
    "learned queries": (lambda m, x: F.scaled_dot_product_attention(m.q, x, x), {"q": drawn(1, 2, 3)}),
    "attention bias": (
        lambda m, x: F.scaled_dot_product_attention(*[x[:, None]] * 3, attn_mask=m.b),
        {"b": drawn(1, 1, 4, 4)},
    ),
    "codebook": (
        lambda m, x: x + F.embedding((x[..., None, :] - m.book.weight).square().sum(-1).argmin(-1), m.book.weight),
        {"book": nn.Embedding(5, 3)},
    ),
    "distances to centres": (lambda m, x: torch.cdist(x, m.w), {"w": drawn(2, 3)}),
    "complex filter": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.w), n=4, dim=1),
        {"w": drawn(3, 3, 2)},
    ),
    "dynamic weights": (lambda m, x: torch.bmm(x, (x.mean(1) @ m.w).view(-1, 3, 2)), {"w": drawn(3, 6)}),
    "determinant": (
        lambda m, x: (x @ m.w).square().sum((1, 2)) - torch.linalg.slogdet(m.w).logabsdet,
        {"w": drawn(3, 3)},
    ),
    "scan": (scanned, {"layer": nn.Linear(3, 3), "decay": drawn(3, 2), "skip": drawn(3)}),
    "in-place operations": (
        lambda m, x: m.layer(x).mul_(m.gain).add_(m.shift).relu_(),
        {"layer": nn.Linear(3, 3), "gain": drawn(3), "shift": drawn(3)},
    ),
    "parameter lists": (
        lambda m, x: x @ m.many[0] + m.named["b"],
        {"many": nn.ParameterList([drawn(3, 3)]), "named": nn.ParameterDict({"b": drawn(3)})},
    ),
    "standardised convolution": (
        lambda m, x: F.conv1d(x, m.conv.weight - m.conv.weight.mean((1, 2), keepdim=True), m.conv.bias),
        {"conv": nn.Conv1d(4, 3, 2)},
    ),
    "weights of another": (
        lambda m, x: torch.func.functional_call(m.layer, {k: 2 * v for k, v in m.layer.named_parameters()}, x),
        {"layer": nn.Linear(3, 2)},
    ),
    "attention with biases for keys": (
        lambda m, x: m.mix(x, x.tanh(), x.sin())[0],
        {"mix": nn.MultiheadAttention(3, 1, batch_first=True, add_bias_kv=True, add_zero_attn=True)},
    ),
    "attention over other widths": (
        lambda m, x: m.mix(x, x[..., :2], x[..., :1])[0],
        {"mix": nn.MultiheadAttention(3, 1, batch_first=True, kdim=2, vdim=1)},
    ),
    "hook of the user's on an output": (
        lambda m, x: hooked(m.layer(m.first(x))).tanh(),
        {"first": nn.Linear(3, 3), "layer": nn.Linear(3, 2)},
    ),
    "parameter read as complex": (
        lambda m, x: (x.mul(1j).exp() @ m.w.to(x.mul(1j).dtype)).imag,
        {"w": drawn(3, 2)},
    ),
    "penalty in every loss": (
        lambda m, x: m.layer(x).sum((1, 2)) + m.layer.weight.square().sum(),
        {"layer": nn.Linear(3, 2)},
    ),
}


@pytest.mark.parametrize("options", [{}, {"memory": "lean"}, {"grad_sample": "materialize"}], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.one_in(3)
def test_ways_of_use_agree_with_batches_of_one(way: str, options: dict[str, Any]) -> None:
    function, held = WAYS[way]
    module = Uses(function, **copy.deepcopy(held))
    assert_engine_agrees(module, _loss(module), _data(4, 3), size=4, **options)


def test_ways_of_use_hold_in_float32() -> None:
    for function, held in WAYS.values():
        module = Uses(function, **copy.deepcopy(held)).float()
        assert_engine_agrees(module, _loss(module), _data(4, 3).float(), size=4, rtol=3e-5)
