"""Parameters used in any way: by a rule, as copies for the samples, through functions of parameters, or refused by
name.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine, leaves, pulling
from lightning_dp.per_sample.rules.conv import ConvRule
from lightning_dp.per_sample.rules.embedding import EmbeddingRule
from lightning_dp.per_sample.rules.linear import LinearRule
from tests.helpers import Hidden
from tests.per_sample.checks import assert_engine_agrees, make_engine, run_batch


def _loss(module: nn.Module):
    def loss(x: Tensor) -> Tensor:
        output = module(x).square()
        return output.flatten(1).sum(1) if output.dim() > 1 else output

    return loss


def _data(*shape: int) -> Tensor:
    return torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Bare(nn.Module):
    """One bare parameter and two layers; input ``(B, 4, 3)``."""

    SHAPES: ClassVar = {
        "class token": (1, 1, 3),
        "repeated class token": (1, 1, 3),
        "repeated and viewed": (1, 2, 3),
        "position": (1, 4, 3),
        "row gain": (1, 3),
        "column gain": (4, 1),
        "gain": (3,),
        "scalar": (),
        "query": (1, 3),
        "query, pooled": (1, 3),
        "row, transposed": (1, 4),
        "unused": (1, 3),
        "table": (4, 3),
    }

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(3, 3)
        self.bare = nn.Parameter(torch.randn(self.SHAPES[how]))
        self.head = nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x, how = self.first(x).tanh(), self.how
        if how == "class token":
            x = torch.cat([self.bare.expand(x.shape[0], -1, -1), x], 1)
        elif how == "repeated class token":
            x = torch.cat([self.bare.repeat(x.shape[0], 1, 1), x], 1)
        elif how == "repeated and viewed":
            x = torch.cat([self.bare.repeat(len(x), 1, 1).view(2 * len(x), 3).view(len(x), 2, 3), x], 1)
        elif how in ("position", "gain", "scalar", "column gain", "table") or how == "row gain":
            x = x * self.bare
        elif how == "query":
            x = torch.softmax(self.bare @ x.transpose(1, 2), -1) @ x
        elif how == "query, pooled":
            x = (self.bare @ x.transpose(1, 2)).mean(1, keepdim=True).transpose(1, 2) * x
        elif how == "row, transposed":
            x = self.bare.T * x
        return self.head(x)


@pytest.mark.parametrize("how", list(Bare.SHAPES))
@pytest.mark.parametrize("size", [0, 1, 3, 4, 6])
@pytest.mark.one_in(3)
def test_bare_parameters_agree_with_batches_of_one(how: str, size: int) -> None:
    torch.manual_seed(0)
    module = Bare(how)
    assert_engine_agrees(module, _loss(module), _data(4, 3), size=size)


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class LayerScale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A transformer block with every kind of parameter, called with the batch first or second."""

    def __init__(self, batch_first: bool = True, need_weights: bool = False) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.norm = RMSNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, dropout=0.0)
        self.need_weights = need_weights
        self.scale = LayerScale(4)
        self.activation = nn.PReLU()
        self.mlp = nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        y = self.norm(x)
        mixed, weights = self.attention(y, y, value=y, need_weights=self.need_weights)
        x = x + self.scale(mixed)
        x = x + self.activation(self.mlp(x))
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        return x if weights is None else x * weights.mean() if len(x) == 1 else x * weights.mean((1, 2))[:, None, None]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.one_in(2)
def test_attention_norm_and_scale(batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    module = Block(batch_first, need_weights)
    for size in (1, 4, 6):
        assert_engine_agrees(module, _loss(module), _data(4, 4), size=size)


def test_attention_with_masks() -> None:
    """A mask without and one with a batch axis, given by keyword."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            padding = x[..., 0] > 1.0
            return self.attention(x, x, x, attn_mask=causal, key_padding_mask=padding, need_weights=False)[0][:, 1:]

    torch.manual_seed(0)
    data = _data(4, 4)
    data[..., 0] = data[..., 0].clamp(max=0.5)
    data[2, 3, 0] = 2.0
    module = Masked().double()
    assert_engine_agrees(module, _loss(module), data)


def test_transformer_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, 2).double()
    assert_engine_agrees(module, _loss(module), _data(3, 4))


def test_batch_norm_is_refused_in_training() -> None:
    module = nn.BatchNorm1d(3)
    with pytest.raises(PrivacyError, match="mixes them"):
        make_engine(module, _loss(module), torch.randn(6, 3))


def test_batch_norm_in_evaluation_mode_is_a_constant_scaling() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3).eval()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x))

    module = Frozen().double()
    nn.init.normal_(module.norm.running_mean)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    assert_engine_agrees(module, _loss(module), _data(3))
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
@pytest.mark.parametrize("axes", [(), (2,)])
def test_bias_that_is_broadcast_over_features(frozen: str, axes: tuple[int, ...]) -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight, self.bias).tanh(), self.weight.T, bias=self.bias)

    torch.manual_seed(0)
    module = Shifted(3, 4).double()
    module.bias = nn.Parameter(torch.full((1,), 0.3, dtype=torch.float64))
    if frozen:
        getattr(module, frozen).requires_grad_(False)
    assert_engine_agrees(module, _loss(module), _data(*axes, 3))


def test_weights_standardised_by_batch_norm_are_followed() -> None:
    class Standardised(nn.Conv1d):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.gain = nn.Parameter(torch.full((self.out_channels,), 0.7))

        def forward(self, x: Tensor) -> Tensor:
            rows = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(rows, None, None, weight=self.gain, training=True, momentum=0.0, eps=1e-6)
            return F.conv1d(x, weight.reshape_as(self.weight), self.bias)

    torch.manual_seed(0)
    module = nn.Sequential(Standardised(3, 4, 2), nn.Tanh(), Standardised(4, 2, 2)).double()
    assert_engine_agrees(module, _loss(module), _data(3, 5))


def test_batch_norm_of_data_is_refused_beside_one_of_weights() -> None:
    class Both(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(self.weight[None], None, None, training=True)[0]
            return F.batch_norm(F.linear(x, weight), None, None, weight=self.bias, training=True)

    module = Both(3, 4)
    with pytest.raises(PrivacyError, match="mixes them"):
        make_engine(module, _loss(module), torch.randn(6, 3))


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        parametrizations.spectral_norm,
        spectral_norm,
        weight_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_parametrizations_agree_with_batches_of_one(wrap: Any) -> None:
    module = nn.Sequential(wrap(nn.Linear(3, 3)), nn.Tanh(), wrap(nn.Linear(3, 2))).double()
    options = {}
    if "spectral" in wrap.__name__:  # its power iteration moves with every forward in training
        module.eval()
        options["evaluation"] = True
    assert_engine_agrees(module, _loss(module), _data(4, 3), **options)


@pytest.mark.parametrize(
    "layer",
    [nn.LSTMCell(3, 2), nn.GRUCell(3, 2), nn.Bilinear(3, 3, 2), nn.ConvTranspose1d(3, 2, 2), nn.EmbeddingBag(5, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_without_a_rule(layer: nn.Module) -> None:
    class Use(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.layer, nn.LSTMCell):
                state = None
                for _ in range(3):
                    state = self.layer(x, state)
                return torch.cat(state, 1)
            if isinstance(self.layer, nn.Bilinear):
                return self.layer(x, x.tanh())
            if isinstance(self.layer, nn.ConvTranspose1d):
                return self.layer(x[:, :, None])
            return self.layer(x)

    torch.manual_seed(0)
    module = Use().double()
    data = torch.randint(0, 5, (6, 3)) if isinstance(layer, nn.EmbeddingBag) else _data(3)
    assert_engine_agrees(module, _loss(module), data)


@pytest.mark.parametrize("how", ["base", "view", "both"])
def test_functions_of_parameters_changed_through_a_view(how: str) -> None:
    """The change is part of what is used later, and of nothing that was used before."""

    class Use(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.w * 1.0
            row = weight[0]
            before = F.linear(x, weight * 2) if how == "both" else x
            if how == "view":
                weight.mul_(3.0)
                return x * row
            row.mul_(3.0)
            return F.linear(before.tanh(), weight)

    torch.manual_seed(0)
    module = Use().double()
    assert_engine_agrees(module, _loss(module), _data(4))


def test_a_transposed_convolution_of_one_position() -> None:
    """Its input is a transposed view, whose strides torch takes for channels that come last."""

    class Use(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.first(x).tanh().transpose(1, 2))

    torch.manual_seed(0)
    module = Use().double()
    assert_engine_agrees(module, _loss(module), _data(1, 4))


def test_randomness_beside_a_parameter_is_drawn_once() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(x, 0.5) * self.gain

    module = Noisy()
    engine = make_engine(module, _loss(module), torch.randn(6, 3))
    data = torch.randn(4, 3)
    engine.begin(4)
    output = module(data)
    output.square().sum().backward()
    torch.testing.assert_close(
        engine.per_sample_gradients()["gain"], 2 * output.detach().square() / module.gain.detach()
    )


def test_a_loop_over_the_samples_is_refused() -> None:
    """A number of calls that changes with the batch: which call belongs to which sample cannot be seen."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row * self.gain for row in x])

    module = Branches().double()
    with pytest.raises(PrivacyError, match=r"mul of 'gain'.*called 2 times with 2 samples.*grad_sample='single'"):
        make_engine(module, _loss(module), _data(3))


def test_one_layer_on_constants_and_on_data() -> None:
    """Data that require no gradient are distinguished from the constants on which the same layer ran before."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            table = self.layer(x.new_ones(2, 3))
            return self.head(self.layer(x) @ table.T @ table)

    torch.manual_seed(0)
    module = Both().double()
    assert_engine_agrees(module, _loss(module), _data(3))


def test_a_penalty_on_weights_counts_in_each_samples_loss() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    assert_engine_agrees(module, lambda x: module(x).square().sum(1) + module.weight.square().sum(), _data(3))


@pytest.mark.parametrize("how", ["penalty", "as many rows for any batch"])
def test_what_sees_no_samples_is_refused(how: str) -> None:
    module = nn.Linear(3, 2)

    def loss(x: Tensor) -> Tensor:
        if how == "penalty":
            return module(x).square().sum(1).mean() + module.weight.square().sum()
        return module(x[torch.randint(len(x), (4,))]).square().mean()

    with pytest.raises(PrivacyError, match=r"(?s)penalty on weights to the loss of each sample.*grad_sample='single'"):
        run_batch(make_engine(module, loss, torch.randn(6, 3)), loss, torch.randn(6, 3), 6)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.table(x)))


def test_tied_weights_add_gradients_before_the_norm() -> None:
    torch.manual_seed(0)
    module = Tied()
    assert "head.weight" not in dict(module.named_parameters())
    assert_engine_agrees(module, _loss(module), torch.randint(0, 7, (6, 3)))


def test_a_weight_used_by_its_layer_and_by_the_module_around_it() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.weight = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh() @ self.weight

    torch.manual_seed(0)
    module = Around().double()
    assert_engine_agrees(module, _loss(module), _data(3))


def test_a_parameter_outside_the_module_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"\['gone'\] outside of it"):
        PerSampleEngine(nn.Linear(1, 1)).set_parameters({"gone": nn.Parameter(torch.ones(1))})


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.one_in(2)
def test_recurrent_and_attention_layers_of_opacus(batch_first: bool) -> None:
    """They work through the linear layers inside them."""
    from opacus.layers import DPLSTM, DPMultiheadAttention

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = DPLSTM(3, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
            self.attention = DPMultiheadAttention(8, 2, add_bias_kv=True, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            x = self.rnn(x)[0]
            x = self.attention(x, x, x)[0]
            return x if batch_first else x.transpose(0, 1)

    torch.manual_seed(0)
    module = Net().double()
    for size in (1, 4, 6):
        engine = assert_engine_agrees(module, _loss(module), _data(4, 3), size=size)
    assert {type(source.rule) for source in engine._tracker.sources.values()} >= {LinearRule}


class Uses(nn.Module):
    """A function of parameters and samples."""

    def __init__(self, function: Any, **held: Any) -> None:
        super().__init__()
        self.function = function
        for name, thing in held.items():
            setattr(self, name, nn.Parameter(thing) if isinstance(thing, Tensor) else thing)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


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


def _thrice(way: Callable[[Tensor], Tensor] = F.softplus) -> Uses:
    def function(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x * way(m.gain) + way(m.shift) * m.gain
        return x

    return Uses(function, gain=drawn(3), shift=drawn(3))


def test_elementwise_operations_share_the_copies_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    own = leaves.copies_of
    monkeypatch.setattr(leaves, "copies_of", lambda *args: made.append(1) or own(*args))
    module = Uses(lambda m, x: (x * m.gain).tanh() * m.gain - m.gain, gain=drawn(3))
    engine = assert_engine_agrees(module, _loss(module), _data(4, 3), size=4)
    made.clear()
    run_batch(engine, _loss(module), _data(4, 3), 4)
    assert len(made) == 1


BLOCKS: dict[str, tuple[Any, int]] = {
    "entries": (lambda m, x: sum((x * m.w[i, j]).sin() * m.w[i, 0] for i in range(4) for j in range(3)), 1),
    "rows": (lambda m, x: sum((x * w).sin() for w in m.w), 1),
    "rows along a later axis": (lambda m, x: sum((x.movedim(0, 2) * w[:, None]).sin() for w in m.w).movedim(2, 0), 1),
    "entries and rows": (lambda m, x: sum((x * w + w[1]).sin() for w in m.w), 2),
    "rows and the whole": (lambda m, x: sum((x * w).sin() for w in m.w) + F.linear(x, m.w[1:]), 1),
    "one of many": (lambda m, x: x * m.w.flatten()[7], 1),
    "columns": (lambda m, x: sum((x * w).sin() for w in m.w[:3].T), 3),
}


@pytest.mark.parametrize("how", list(BLOCKS))
def test_blocks_of_a_parameter_are_copied_together(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    function, num = BLOCKS[how]
    module, made, own = Uses(function, w=drawn(4, 3)), [], leaves.copies_of
    assert_engine_agrees(module, _loss(module), _data(4, 3), size=4)
    engine = assert_engine_agrees(module, _loss(module), _data(4, 3), size=4, memory="lean")
    monkeypatch.setattr(leaves, "copies_of", lambda *args: made.append(1) or own(*args))
    run_batch(engine, _loss(module), _data(4, 3), 4)
    assert len(made) == num


def test_copies_of_blocks_follow_a_parameter_that_changes() -> None:
    module, x = Uses(lambda m, x: sum(x * w for w in m.w), w=drawn(4, 3)), _data(4, 3)
    engine = make_engine(module, _loss(module), x)
    for factor in (2.0, 3.0):
        engine.begin(6)
        before = module(x)
        with torch.no_grad():
            module.w.mul_(factor)
        torch.testing.assert_close(module(x), before * factor)
        engine.end()


@pytest.mark.parametrize("how", ["in place", "other memory"])
def test_copies_follow_a_parameter_that_changes_within_a_step(how: str) -> None:
    """As a step of an optimizer does under manual optimization: the next use sees the new values."""
    module, x = Uses(lambda m, x: x * m.gain, gain=drawn(3)), _data(4, 3)
    engine = make_engine(module, _loss(module), x)
    for factor in (2.0, 3.0):
        engine.begin(6)
        before = module(x)
        with torch.no_grad():
            if how == "in place":
                module.gain.mul_(factor)
            else:
                module.gain.data = module.gain.data * factor
        torch.testing.assert_close(module(x), before * factor)
        engine.end()


@pytest.mark.parametrize("how", ["together", "too large together", "not mapped"])
def test_functions_of_parameters_are_pulled_back_in_one_pass(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Unless they are too large together, or their backward cannot be mapped over the samples."""
    module, x = _thrice(lambda weight: F.softplus(weight[None])), _data(4, 3)
    engine = make_engine(module, _loss(module), x)
    run_batch(engine, _loss(module), x, 4)
    expected = engine.per_sample_gradients()
    asked: list[bool] = []
    own: Any = torch.autograd.grad

    def grad(*args: Any, is_grads_batched: bool = False, **kwargs: Any) -> Any:
        asked.append(is_grads_batched)
        if is_grads_batched and how == "not mapped":
            raise RuntimeError("no batching rule")
        return own(*args, is_grads_batched=is_grads_batched, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    if how == "too large together":
        monkeypatch.setattr(pulling, "MOST_AT_ONCE", 12)
    run_batch(engine, _loss(module), x, 4)
    grads = engine.per_sample_gradients()
    assert (
        asked
        == {
            "together": [True],
            "too large together": [True] * 2,  # two functions, each used three times
            "not mapped": [True] + 2 * [True, *[False] * 4],
        }[how]
    )
    for name, grad_of_name in grads.items():
        torch.testing.assert_close(grad_of_name, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("numbers", [1, 2])
def test_a_number_is_pulled_back_without_a_map(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Its gradient is that of all samples, up to a factor; numbers of different parameters take one pass."""

    def function(m: Any, x: Tensor) -> Tensor:
        penalties = [m.gain.exp().square().sum(), m.shift.sin().sum()][:numbers]
        return x * m.gain.softmax(0) + sum(x.mean((1, 2), keepdim=True) * one for one in penalties)

    module = Uses(function, gain=drawn(3), shift=drawn(3))

    def loss(x: Tensor) -> Tensor:
        return module(x).flatten(1).sum(1)

    names = ["gain", "shift"][:numbers]
    engine = assert_engine_agrees(module, loss, _data(4, 3), names=names, size=4)
    asked: list[bool] = []
    own: Any = pulling._vjp
    monkeypatch.setattr(pulling, "_vjp", lambda *a, batched=False: asked.append(batched) or own(*a, batched=batched))
    run_batch(engine, loss, _data(4, 3), 4)
    engine.per_sample_gradients()
    assert asked == [False, True]


ENTRYWISE: dict[str, tuple[Callable[[Any], Tensor], int]] = {
    "chain": (lambda m: m.gain + torch.log1p(m.shift.exp()) * m.noise, 0),
    "twice": (lambda m: m.gain.sigmoid() * m.gain, 0),
    "two of one parameter": (lambda m: F.softplus(m.gain) * m.row + m.gain.exp().cos(), 1),
    "constants that broadcast": (lambda m: torch.where(m.gain > 0, m.gain * 2.0, m.row.abs()) * m.row, 0),
    "row that broadcasts": (lambda m: m.gain * m.row.exp(), 1),
    "transposed": (lambda m: m.gain.T * m.shift, 1),
    "changed through a view": (lambda m: _with_first_row_of_zero(m.gain * 2.0) * m.shift, 1),
    "in place": (lambda m: (m.gain * 2.0).mul_(m.row), 1),
    "sum over entries": (lambda m: m.gain.cumsum(0) * m.shift, 1),
}


def _with_first_row_of_zero(tensor: Tensor) -> Tensor:
    tensor[0].zero_()
    return tensor


@pytest.mark.parametrize("how", list(ENTRYWISE))
def test_a_function_entry_by_entry_is_pulled_back_without_a_map(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Its Jacobian is a diagonal; others are pulled back for each sample."""
    function, num_mapped = ENTRYWISE[how]
    module = Uses(lambda m, x: F.linear(x, function(m)), gain=drawn(3, 3), shift=drawn(3, 3))
    for name, shape in {"noise": (3, 3), "row": (3,)}.items():
        module.register_buffer(name, drawn(*shape).double())
    if how in ("two of one parameter", "row that broadcasts"):
        module.row = nn.Parameter(module._buffers.pop("row"))
    engine = assert_engine_agrees(module, _loss(module), _data(4, 3), size=4)
    asked: list[bool] = []
    own: Any = pulling._vjp
    monkeypatch.setattr(pulling, "_vjp", lambda *a, batched=False: asked.append(batched) or own(*a, batched=batched))
    run_batch(engine, _loss(module), _data(4, 3), 4)
    engine.per_sample_gradients()
    assert sum(asked) == num_mapped


def test_functions_of_parameters_are_freed_with_the_step() -> None:
    module = Uses(lambda m, x: x * m.gain.exp(), gain=drawn(3))
    engine = make_engine(module, _loss(module), _data(4, 3))
    engine.begin(4)
    made = weakref.ref(module.gain.exp())
    engine.end()
    gc.disable()
    try:
        assert made() is None
    finally:
        gc.enable()


def test_ways_of_use_hold_in_float32() -> None:
    for function, held in WAYS.values():
        module = Uses(function, **copy.deepcopy(held)).float()
        assert_engine_agrees(module, _loss(module), _data(4, 3).float(), size=4, rtol=3e-5)


def test_views_of_a_parameter_keep_its_rule() -> None:
    """Chunks and transposes of a weight are linear layers without gradients of the weight's size."""
    for way in ("chunks", "product from the left", "codebook"):
        function, held = WAYS[way]
        module = Uses(function, **copy.deepcopy(held))
        engine = make_engine(module, _loss(module), _data(4, 3))
        run_batch(engine, _loss(module), _data(4, 3), 4)
        rules = {type(source.rule) for source in engine._tracker.sources.values() if source.uses or source.memory()}
        assert (EmbeddingRule if way == "codebook" else LinearRule) in rules
        assert (engine._parts._sorted({"w"}, {})[1] == {}) or way == "codebook"


def test_attention_with_dropout_draws_once_for_all_samples() -> None:
    """Its gradients are those of the outputs that it gave."""
    module = nn.MultiheadAttention(4, 2, dropout=0.0, batch_first=True).double()
    data = _data(3, 4)
    engine = make_engine(module, lambda x: module(x, x, x)[0].sum((1, 2)), data)
    module.dropout = 0.5  # off while the layout is learned, as the strategy has it
    engine.begin(6)
    torch.manual_seed(5)
    output = module(data, data, data)[0]
    output.square().sum().backward()
    grads = engine.per_sample_gradients()
    engine.end()
    torch.manual_seed(5)
    plain = module(data, data, data)[0]
    torch.testing.assert_close(plain, output)
    assert not torch.allclose(module(data, data, data)[0], output)
    expected = torch.autograd.grad(plain.square().sum(), list(module.parameters()))
    for (name, _), grad in zip(module.named_parameters(), expected, strict=True):
        torch.testing.assert_close(grads[name].sum(0), grad)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


class Rounded(torch.autograd.Function):
    """A gradient that passes straight through, twice as large; to a step size, one of its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor) -> Tensor:
        return (weight / step).round().clamp(-3, 3) * step

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0], 3 * grads[0].sum().reshape(1)


round_by = Rounded.apply


class Sparse(torch.autograd.Function):
    """A threshold from sorted logits, with indices and constants on the way, as sparsemax has it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, shift: Tensor, dim: int) -> Tensor:
        top, at = logits.max(dim, keepdim=True)
        logits = logits - top + shift[at.clamp_max(0)]
        ordered = torch.sort(logits, dim=dim, descending=True)[0]
        rho = torch.arange(1, logits.shape[dim] + 1).view(1, -1)
        size = (rho * ordered > ordered.cumsum(dim) - 1).sum(dim, keepdim=True)
        tau = ((ordered.cumsum(dim) - 1) / rho).gather(dim, size - 1)
        out = torch.clamp(logits - tau, min=0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inside = ctx.saved_tensors[0] > 0
        return grads[0] * inside, 0.5 * (grads[0] * inside).sum().reshape(1), None


def normed(m: Any, x: Tensor) -> Tensor:
    """Spectral norm: its power iteration runs without gradient on the weight that it then divides."""
    weight = m.w.flatten(1)
    with torch.no_grad():
        v = torch.nn.functional.normalize(weight.t() @ torch.ones(3, dtype=weight.dtype), dim=0)
        u = torch.nn.functional.normalize(weight @ v, dim=0).clone()
    return x @ (m.w / torch.dot(u, weight @ v.clone()))


BY_OWN_CODE: dict[str, Any] = {
    "of a parameter": lambda m, x: x @ Rounded.apply(m.w, m.s),
    "of functions": lambda m, x: x @ (Rounded.apply(m.w / m.s, m.s.exp()) * m.s),
    "by indices and constants": lambda m, x: x @ Sparse.apply(m.w, m.s, -1),
    "bound early": lambda m, x: (x @ round_by(m.w, m.s)).tanh() @ round_by(m.w, m.s).t(),
    "without gradient": normed,
}


@pytest.mark.parametrize("name", BY_OWN_CODE)
def test_functions_of_autograd_on_parameters_alone_are_followed(name: str) -> None:
    module = Uses(BY_OWN_CODE[name], w=drawn(3, 2), s=torch.tensor([0.4]))
    assert_engine_agrees(module, _loss(module), _data(4, 3), names=["w"] if name == "without gradient" else None)


def _scattered(m: Any, x: Tensor, mask: list[Any]) -> Tensor:
    weight = torch.zeros(torch.tensor(mask).shape + m.w.shape[1:], dtype=torch.float64)
    weight[torch.tensor(mask)] = m.w
    return x @ weight.t()


@pytest.mark.parametrize(
    ("weight", "mask"),
    [
        (drawn(3, 2), [True, False, True, True, False]),
        (drawn(2), [[False, True], [True, False], [False, False]]),
        (drawn(1, 2), [True, False, True]),
        (drawn(2, 2), [True, True]),
    ],
)
def test_a_mask_takes_one_row_for_each_true_entry(weight: Tensor, mask: list[Any]) -> None:
    module = Uses(lambda m, x: _scattered(m, x, mask) + x @ m.v, w=weight, v=drawn(2, 1))
    assert_engine_agrees(module, _loss(module), _data(4, 2))


def test_an_empty_mask_writes_nothing() -> None:
    module = Uses(lambda m, x: _scattered(m, x, [False, False]) + x @ m.v, w=drawn(3, 2)[:0], v=drawn(2, 1))
    assert_engine_agrees(module, _loss(module), _data(4, 2), names=["v"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("derived", [False, True])
def test_uses_that_do_not_report_themselves_are_found(scripted: bool, derived: bool) -> None:
    """Of a parameter and of a function of it: no raw gradient stays, and the parameter is named."""
    function = torch.jit.script(_product) if scripted else Hidden.apply
    module = Uses(
        lambda m, x: m.layer(x) + function(x, 2 * m.w if derived else m.w), w=drawn(3, 2), layer=nn.Linear(3, 2)
    )
    engine = make_engine(module, _loss(module), _data(4, 3))
    cause = "a torch.autograd.Function, a scripted" if scripted else "the torch.autograd.Function Hidden, which hides"
    with pytest.raises(PrivacyError, match=rf"\['w'\]: {cause}.*grad_sample='single'"):
        run_batch(engine, _loss(module), _data(4, 3), 4)
    assert module.w.grad is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated:DeprecationWarning")
def test_a_scripted_layer_is_found() -> None:
    module = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.Linear(3, 2)).double()
    engine = make_engine(module, _loss(module), _data(3))
    with pytest.raises(PrivacyError, match=r"\['0.bias', '0.weight'\]"):
        run_batch(engine, _loss(module), _data(3), 4)


def test_a_compiled_layer_reports_itself() -> None:
    """It runs as it was before it was compiled, and is compiled again afterwards."""
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        runs.append(1)
        return graph

    module = nn.Sequential(torch.compile(nn.Linear(3, 3), backend=backend), nn.Tanh(), nn.Linear(3, 2)).double()  # type: ignore[call-overload]
    assert_engine_agrees(module, _loss(module), _data(3))
    assert not runs or module(_data(3)) is not None


@pytest.mark.parametrize("how", ["penalty", "pooled", "statistic"])
def test_parameters_that_meet_no_samples_are_refused(how: str) -> None:
    layer = nn.Linear(3, 2).double()

    def loss(x: Tensor) -> Tensor:
        if how == "penalty":
            return layer(x).sum() + layer.weight.square().sum()
        if how == "pooled":
            return layer(x).sum(1) + layer(x.mean(0)).sum()
        return layer(x).sum(1) + (layer(x).mean(0) * layer.bias).sum()

    match = {
        "penalty": r"'sum\(square\(weight\)\)' to meet tensors with a batch axis.*weight_decay",
        "pooled": r"linear of 'weight', 'bias'.*without a batch axis whose values change with.*samples are mixed",
        "statistic": r"mul of 'bias'.*without a batch axis.*a statistic of the batch mixes its samples",
    }[how]
    with pytest.raises(PrivacyError, match=match):
        make_engine(layer, loss, _data(3))


def test_a_function_of_an_earlier_batch_is_refused() -> None:
    module = Uses(lambda m, x: x * (m.w.exp() if m.kept is None else m.kept), w=drawn(3))
    module.kept = None
    engine = make_engine(module, _loss(module), _data(3))
    engine.begin(4)
    kept = module.w.exp()
    engine.begin(4)
    module.kept = kept
    with pytest.raises(PrivacyError, match=r"'exp\(w\)' of an earlier one"):
        module(_data(3)[:4])


def test_state_that_moves_with_every_forward_is_a_constant() -> None:
    """As the vectors of spectral norm: they differ from run to run at the same batch size too."""

    def scaled(m: Any, x: Tensor) -> Tensor:
        m.state += 1.0
        return x * (m.w * m.state)

    module = Uses(scaled, w=drawn(3))
    module.state = torch.zeros(3, dtype=torch.float64)
    make_engine(module, _loss(module), _data(3))


def test_parameters_look_like_parameters_in_a_step() -> None:
    module = nn.Linear(3, 2).double()
    average, seen = torch.zeros(2, 3, dtype=torch.float64), []

    def loss(x: Tensor) -> Tensor:
        weight = module.weight
        with torch.no_grad():
            average.mul_(0.5).add_(weight, alpha=0.5)
            plain = weight * 1.0
        seen.append(
            (isinstance(weight, nn.Parameter), weight.requires_grad, weight.is_leaf, type(plain), type(weight.detach()))
        )
        state = copy.deepcopy(module.state_dict())
        assert all(type(value) is Tensor for value in state.values())
        assert type(copy.deepcopy(module).weight) is nn.Parameter
        assert weight is dict(module.named_parameters())["weight"]
        return module(x).sum(1)

    engine = make_engine(module, loss, _data(3))
    seen.clear()
    run_batch(engine, loss, _data(3), 4)
    assert seen == [(True, True, True, Tensor, Tensor)]
    assert type(average) is Tensor
    engine.end()
    assert type(module.weight) is nn.Parameter


def test_parameters_of_one_function_train_together() -> None:
    """Their gradients come from one computation, which cannot be forgotten in part."""
    module = Uses(lambda m, x: F.linear(x, m.b @ m.a), a=drawn(2, 3), b=drawn(4, 2))
    engine = make_engine(module, _loss(module), _data(3))
    run_batch(engine, _loss(module), _data(3), 4)
    with pytest.raises(PrivacyError, match="in one optimizer"):
        engine.discard(["a"])
    engine.discard(["a", "b"])
    assert not engine.has_backprops(["a", "b"])


@pytest.mark.parametrize(("equation", "operands"), [("bti,io->tio", 1), ("bti,io,ctj->b", 2)])
@pytest.mark.parametrize("zero", [False, True])
def test_a_product_over_the_samples_is_named(equation: str, operands: int, zero: bool) -> None:
    """It is found at the first use, before a step has moved a weight from zero."""
    weight = torch.zeros(3, 3, dtype=torch.float64) if zero else drawn(3, 3)
    mixing = Uses(lambda m, x: torch.einsum(equation, x, m.w, *[x] * (operands - 1)), w=weight)
    engine = make_engine(mixing, lambda x: mixing(x).sum(), _data(4, 3))
    with pytest.raises(PrivacyError, match=r"einsum of 'w' to keep the samples apart"):
        run_batch(engine, lambda x: mixing(x).sum(), _data(4, 3), 4)


def test_uses_within_vmap_are_refused() -> None:
    layer = nn.Linear(3, 2).double()
    with pytest.raises(
        PrivacyError, match=r"linear of 'weight', 'bias' to see the samples.*within torch.vmap.*any module\.$"
    ) as raised:
        make_engine(layer, lambda x: torch.vmap(layer)(x).sum(), _data(4, 3))
    assert "sample_of_row" not in str(raised.value)  # which does not help within a transform


def test_functions_of_parameters_within_vmap_are_refused() -> None:
    module = Uses(lambda m, x: torch.vmap(lambda row: row @ m.w.exp())(x), w=drawn(3, 2))
    with pytest.raises(PrivacyError, match=r"linear of 'transpose\(exp\(w\)\)' to see .*within torch\.vmap"):
        make_engine(module, _loss(module), _data(4, 3))


def test_later_functions_within_vmap_are_refused() -> None:
    """Torch raises an error of its own there, after which samples would not run one at a time."""
    module = Uses(
        lambda m, x: x @ m.mapped(lambda ones: m.w.exp() * ones)(torch.ones(1, 3, 2).double())[0], w=drawn(3, 2)
    )
    module.mapped = lambda function: function
    engine = make_engine(module, _loss(module), _data(4, 3))
    module.mapped = torch.vmap
    with pytest.raises(PrivacyError, match=r"Expected functions of 'w' alone outside of torch\.func"):
        run_batch(engine, _loss(module), _data(4, 3), 4)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_rows_that_differ_by_sample_are_no_copies(value: float) -> None:
    """A table of positions that is indexed by samples, by mistake: its rows are equal before the first step only."""
    module = Uses(lambda m, x: x + m.w[: len(x)], w=torch.full((9, 1, 3), value, dtype=torch.float64))
    with pytest.raises(PrivacyError, match=r"__getitem__ of 'w' works on, but its result is not the same for every"):
        make_engine(module, _loss(module), _data(4, 3))


def test_an_operation_in_place_is_tried_on_copies() -> None:
    """The first use is compared with the operation itself; the user's tensor is written to once."""
    module = Uses(lambda m, x: (x[:, 0] * 1.0).addmv_(x, m.w).tanh(), w=drawn(3))
    assert_engine_agrees(module, lambda x: module(x).square(), _data(3))


def test_the_convolution_rule_needs_the_samples_first() -> None:
    """Samples along the channels would be convolved over."""
    module = Uses(
        lambda m, x: F.conv1d(x.transpose(0, 1), m.w.expand(len(x), 1, 1), groups=len(x)).transpose(0, 1),
        w=drawn(1, 1, 1),
    )
    assert_engine_agrees(module, _loss(module), _data(4, 3), size=4)  # a weight for each sample
    spec = nn.Conv1d(1, 1, 1)
    assert ConvRule().follows(spec, 0, 3)
    assert not ConvRule().follows(spec, 1, 3)
    assert not ConvRule().follows(spec, 0, 2)  # the channels of one sample


def test_long_chains_of_functions_have_short_names() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight
            for _ in range(100):
                weight = weight.sin() + 0.1
            return F.linear(x, weight)

    module, data = Chain(), torch.randn(5, 3, dtype=torch.float64)
    engine = assert_engine_agrees(module, lambda x: module(x).sum(1), data)
    run_batch(engine, lambda x: module(x).sum(1), data, 5)
    assert max(len(str(source)) for source in engine._tracker.sources.values()) < 400
