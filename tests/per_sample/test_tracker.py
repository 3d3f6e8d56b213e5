"""Parameters used in any way: by a rule, as copies for the samples, through functions of parameters, or refused by
name.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine
from lightning_dp.per_sample.rules.linear import LinearRule
from tests.per_sample.checks import assert_engine_agrees, make_engine, run_batch
from tests.per_sample.ways_of_use import _data, _loss


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
