"""Parameters used by layers without a rule, by norms and attention, through parametrizations, and tied ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.errors import PrivacyError
from tests.per_sample.checks import assert_engine_agrees, make_engine
from tests.per_sample.ways_of_use import Block, _data, _loss


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
