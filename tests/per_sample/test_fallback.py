"""Parameters without a rule: expanded where that is exact, recomputed elsewhere, refused where neither can be."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine
from lightning_dp.per_sample.fallback import RecomputeUnit
from lightning_dp.per_sample.units import ExpandUnit
from tests.per_sample.checks import assert_engine_agrees, make_engine, run_batch


def _loss(module: nn.Module):
    return lambda x: module(x).square().flatten(1).sum(1)


def _data(*shape: int) -> Tensor:
    return torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Bare(nn.Module):
    """One bare parameter beside two layers; input ``(B, 4, 3)``."""

    SHAPES: ClassVar = {
        "class token": (1, 1, 3),
        "repeated class token": (1, 1, 3),
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
def test_bare_parameters_agree_with_batches_of_one(how: str, size: int) -> None:
    torch.manual_seed(0)
    module = Bare(how)
    assert_engine_agrees(module, _loss(module), _data(4, 3), size=size)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("class token", ExpandUnit),
        ("position", ExpandUnit),
        ("repeated class token", RecomputeUnit),
        ("row gain", RecomputeUnit),
        ("query, pooled", RecomputeUnit),
        ("gain", RecomputeUnit),
    ],
)
def test_the_cheap_way_is_taken_only_where_it_is_exact(how: str, kind: type) -> None:
    """Expanding a pooled query keeps every shape and value, and mixes samples: the gradients show it."""
    module = Bare(how)
    engine = make_engine(module, _loss(module), _data(4, 3), with_backward=True)
    assert [type(unit) for unit in engine._units if "bare" in unit.names] == [kind]


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


def test_attention_with_dropout_is_refused() -> None:
    module = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
    engine = PerSampleEngine(module)
    with pytest.raises(PrivacyError, match=r"dropout=0\.1 in 'self_attn'.*lightning_dp\.fix"):
        engine.set_parameters(dict(module.named_parameters()))


def test_transformer_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, 2).double()
    assert_engine_agrees(module, _loss(module), _data(3, 4))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_refused(kind: type) -> None:
    module = nn.ModuleDict({"rnn": kind(3, 4)})
    with pytest.raises(PrivacyError, match=f"{kind.__name__} at 'rnn'.*lightning_dp.fix.*microbatch_size=1"):
        PerSampleEngine(module).set_parameters(dict(module.named_parameters()))


def test_batch_norm_is_refused_in_training() -> None:
    module = nn.BatchNorm1d(3)
    with pytest.raises(PrivacyError, match="mixes them"):
        PerSampleEngine(module).set_parameters(dict(module.named_parameters()))


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


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.orthogonal, spectral_norm, weight_norm]
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_parametrizations_are_refused(wrap: Any) -> None:
    module = nn.Sequential(wrap(nn.Linear(3, 3)))
    with pytest.raises(PrivacyError, match=r"parametrization.*microbatch_size=1"):
        PerSampleEngine(module).set_parameters(dict(module.named_parameters()))


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


def test_a_module_that_draws_random_numbers_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x) * self.gain

    module = Noisy()
    engine = make_engine(module, _loss(module), torch.randn(6, 3))
    run_batch(engine, _loss(module), torch.randn(6, 3), 4)
    with pytest.raises(PrivacyError, match=r"no random numbers.*'gain'.*module of its own"):
        engine.squared_norms([["gain"]])
    engine.detach()
    module.drop.p = 0.0
    assert_engine_agrees(module.double(), _loss(module), _data(3))


def test_a_module_that_changes_its_input_is_refused() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.gain
            x.zero_()
            return y

    module = Overwrites()
    engine = make_engine(module, lambda x: module(x.clone()).sum(1), torch.randn(6, 3))
    with pytest.raises(PrivacyError, match="leave its inputs as they are"):
        run_batch(engine, lambda x: module(x.clone()).sum(1), torch.randn(6, 3), 4)


def test_a_module_that_no_map_can_run_is_looped_over() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            rows = [row * self.gain if float(row.sum()) > 0 else row - self.gain for row in x]
            return torch.stack(rows)

    module = Branches().double()
    assert_engine_agrees(module, _loss(module), _data(3))


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
def test_layers_that_fix_puts_in(batch_first: bool) -> None:
    """Opacus' recurrent and attention layers work through the linear layers inside them."""
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
    assert not any(unit.module is module.rnn for unit in engine._units)


def test_layer_called_by_a_module_that_does_not_hold_it_is_refused() -> None:
    class Caller(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.__dict__["layer"] = layer

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.layer(torch.eye(3)).mT

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.caller = Caller(self.layer)

        def forward(self, x: Tensor) -> Tensor:
            return self.caller(x)

    module = Outer()
    engine = PerSampleEngine(module)
    engine.attach()
    engine.set_parameters(dict(module.named_parameters()))
    with pytest.raises(PrivacyError, match="'caller', which does not contain it"):
        engine.learn_layout(lambda size: module(torch.ones(2, 3).repeat(3, 1)[:size]))
