"""Layers exchanged for private ones: same outputs where promised, nothing else touched, twice is once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning import LightningModule
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import Tensor, nn
from torchmetrics.classification import BinaryAccuracy

from lightning_dp.fix import fix
from lightning_dp.per_sample.independence import find_unsupported

F64 = torch.float64


def trained(module: nn.Module) -> nn.Module:
    """Give every parameter and buffer a value of its own."""
    torch.manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 0.9)
    return module


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad]))


@pytest.mark.parametrize(
    ("norm", "groups"),
    [
        (nn.BatchNorm2d(64), 32),
        (nn.BatchNorm2d(32), 16),
        (nn.BatchNorm3d(24), 8),
        (nn.BatchNorm2d(7), 1),
        (nn.BatchNorm2d(1), 1),
        (nn.BatchNorm1d(64), 4),
        (nn.BatchNorm1d(32), 2),
        (nn.BatchNorm1d(10), 1),
        (nn.SyncBatchNorm(64), 32),
        (nn.BatchNorm2d(64, affine=False), 32),
        (nn.BatchNorm2d(64, eps=0.1, dtype=F64), 32),
        (nn.BatchNorm2d(64).eval(), 32),
        (nn.BatchNorm2d(64, affine=False, track_running_stats=False).eval(), 32),
    ],
)
def test_fix_makes_batch_norm_a_group_norm_with_its_weights(norm: nn.BatchNorm2d, groups: int) -> None:
    trained(norm)
    fixed, changes = fix(norm)
    assert type(fixed) is nn.GroupNorm
    assert (fixed.num_groups, fixed.num_channels, fixed.eps) == (groups, norm.num_features, norm.eps)
    assert fixed.affine == norm.affine
    assert fixed.training == norm.training
    for name, parameter in norm.named_parameters():
        torch.testing.assert_close(fixed.get_parameter(name), parameter)
        assert fixed.get_parameter(name) is not parameter
    assert len(changes) == 1
    assert changes[0].startswith(f"the module itself: {type(norm).__name__} became GroupNorm with {groups} groups")
    assert ("weight and bias carried over" in changes[0]) == norm.affine
    assert ("running statistics dropped" in changes[0]) == (norm.running_mean is not None)


def test_fixed_batch_norm_of_flat_inputs_still_tells_them_apart() -> None:
    fixed = fix(nn.Sequential(nn.Linear(3, 32), nn.BatchNorm1d(32))).module
    out = fixed(torch.randn(6, 3))
    assert out.std(0).min() > 1e-3


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("kind", "fixed_kind", "options"),
    [
        (nn.LSTM, DPLSTM, {}),
        (nn.LSTM, DPLSTM, {"num_layers": 2, "bias": False}),
        (nn.GRU, DPGRU, {"num_layers": 2}),
        (nn.RNN, DPRNN, {"num_layers": 2}),
        (nn.RNN, DPRNN, {"nonlinearity": "relu"}),
    ],
)
def test_fix_keeps_outputs_and_gradients_of_recurrent_layers(
    kind: type[nn.RNNBase], fixed_kind: type[nn.Module], options: dict, batch_first: bool, bidirectional: bool
) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, batch_first=batch_first, bidirectional=bidirectional, dtype=F64, **options)
    fixed, changes = fix(layer)
    assert type(fixed) is fixed_kind
    assert changes == [
        f"the module itself: {kind.__name__} became opacus' {fixed_kind.__name__}; weights carried over, same outputs"
    ]
    x = torch.randn(5, 2, 3, dtype=F64)
    states = torch.randn(layer.num_layers * (1 + bidirectional), 5 if batch_first else 2, 4, dtype=F64)
    for start in (None, (states, states.flip(0)) if kind is nn.LSTM else states):
        expected, expected_state = layer(x, start)
        got, got_state = fixed(x, start)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(got_state, expected_state)
    assert len(list(fixed.parameters())) == len(list(layer.parameters()))
    ours = dict(fixed.named_parameters())
    for name, grad in zip(ours, gradients(fixed, got.square().sum()), strict=True):
        (theirs,) = torch.autograd.grad(expected.square().sum(), layer.get_parameter(name), retain_graph=True)
        torch.testing.assert_close(grad, theirs)


def test_fix_says_that_dropout_of_recurrent_layers_differs() -> None:
    changed = fix(nn.Sequential(nn.LSTM(3, 4, num_layers=2, dropout=0.25)))
    assert changed.module[0].dropout == 0.25
    assert changed.changes[0].startswith("0: LSTM became")
    assert "dropout=0.25 now acts" in changed.changes[0]
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        single = nn.LSTM(3, 4, dropout=0.25)
    # there it has no effect in torch, but would have in opacus
    changed = fix(single)
    assert changed.module.dropout == 0
    assert "dropout" not in changed.changes[0]


ATTENTIONS = [
    {},
    {"bias": False},
    {"kdim": 3, "vdim": 5},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 3},
]


def masks_of(kind: str, batch: int, heads: int, target: int, source: int) -> dict[str, Tensor]:
    """Return keyword arguments with the masks of one kind; no row is masked as a whole."""
    hidden = torch.rand(batch * heads, target, source) < 0.4
    hidden[..., 0] = False
    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[1, -2:] = True
    additive = torch.randn(target, source, dtype=F64)
    return {
        "none": {},
        "2d": {"attn_mask": hidden[0]},
        "3d": {"attn_mask": hidden},
        "additive": {"attn_mask": additive},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden[0], "key_padding_mask": padding},
        "both 3d": {"attn_mask": hidden, "key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize("options", ATTENTIONS, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["none", "2d", "3d", "additive", "padding", "both", "both 3d"])
def test_fix_keeps_outputs_and_gradients_of_attention(options: dict, batch_first: bool, kind: str) -> None:
    layer = trained(nn.MultiheadAttention(4, 2, batch_first=batch_first, dtype=F64, **options))
    fixed, changes = fix(layer)
    assert isinstance(fixed, DPMultiheadAttention)
    assert changes == [
        "the module itself: MultiheadAttention became an attention made of Linear layers; weights carried over, same "
        "outputs"
    ]
    torch.manual_seed(1)
    batch, target, source = 3, 4, 6
    query = torch.randn(batch, target, 4, dtype=F64)
    key = torch.randn(batch, source, options.get("kdim", 4), dtype=F64)
    value = torch.randn(batch, source, options.get("vdim", 4), dtype=F64)
    if not batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    masks = masks_of(kind, batch, 2, target, source)
    for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected, expected_weights = layer(query, key, value, **masks, **weights)
        got, got_weights = fixed(query, key, value, **masks, **weights)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(got_weights, expected_weights)
    inputs = (query.clone().requires_grad_(), key, value)
    for attend in (layer, fixed):
        attend(*inputs, **masks)[0].square().sum().backward()
    if "in_proj_weight" in dict(layer.named_parameters()):
        joined = torch.cat([each.weight.grad for each in (fixed.qlinear, fixed.klinear, fixed.vlinear)])
        torch.testing.assert_close(joined, layer.in_proj_weight.grad)
    else:
        torch.testing.assert_close(fixed.klinear.weight.grad, layer.k_proj_weight.grad)
    torch.testing.assert_close(fixed.out_proj.weight.grad, layer.out_proj.weight.grad)


def test_fixed_attention_takes_inputs_without_a_batch_axis() -> None:
    layer = trained(nn.MultiheadAttention(4, 2, dtype=F64))
    fixed = fix(layer).module
    x = torch.randn(5, 4, dtype=F64)
    padding = torch.tensor([False, False, True, False, True])
    for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.randn(2, 5, 5, dtype=F64)}):
        torch.testing.assert_close(fixed(x, x, x, **masks), layer(x, x, x, **masks))


def test_fixed_attention_drops_out_in_training_only() -> None:
    fixed = fix(nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)).module
    x = torch.randn(2, 50, 4)
    for options in ({}, {"need_weights": False}):
        assert not torch.equal(fixed.train()(x, x, x, **options)[0], fixed(x, x, x, **options)[0])
        assert torch.equal(fixed.eval()(x, x, x, **options)[0], fixed(x, x, x, **options)[0])
    fixed.train()
    assert 0.4 < (fixed(x, x, x, average_attn_weights=False)[1] == 0).float().mean() < 0.6


def test_fixed_attention_refuses_is_causal_without_a_mask() -> None:
    fixed = fix(nn.MultiheadAttention(4, 2)).module
    x = torch.randn(5, 2, 4)
    with pytest.raises(ValueError, match="Expected attn_mask beside is_causal, got is_causal=True"):
        fixed(x, x, x, is_causal=True)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_fix_keeps_outputs_of_a_transformer(batch_first: bool, training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first, dtype=F64)
    module = nn.TransformerEncoder(layer, 2).train(training)
    fixed, changes = fix(copy.deepcopy(module))
    assert [change.split(":")[0] for change in changes] == ["layers.0.self_attn", "layers.1.self_attn"]
    x = torch.randn(3, 5, 8, dtype=F64) if batch_first else torch.randn(5, 3, 8, dtype=F64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=F64)
    with torch.set_grad_enabled(training):
        for masks in ({}, {"mask": causal, "is_causal": True}, {"src_key_padding_mask": padding}):
            shown = (slice(None), slice(0, 3)) if batch_first else (slice(0, 3),)
            torch.testing.assert_close(fixed(x, **masks)[shown], module(x, **masks)[shown])


class Model(LightningModule):
    """A LightningModule with everything that a copy or a new object would lose."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU())
        self.same_norm = self.body[1]
        self.rnn = nn.GRU(width, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.accuracy = BinaryAccuracy()
        self.callback_of = lambda: None  # cannot be pickled

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)[:, None]
        x = self.rnn(x)[0]
        return self.norm(self.attention(x, x, x)[0].expand(-1, 3, -1).mT)


def test_fix_works_inside_a_lightning_module_and_a_second_time_changes_nothing() -> None:
    model = trained(Model(width=32))
    kept = {name: child for name, child in model.named_modules() if name in {"", "body", "body.0", "norm", "accuracy"}}
    fixed, changes = fix(model)
    assert fixed is model
    assert {name: fixed.get_submodule(name) for name in kept} == kept
    assert model.hparams == {"width": 32}
    assert model._trainer is None
    assert [change.split(" ")[:2] for change in changes] == [
        ["body.1:", "BatchNorm1d"],
        ["rnn:", "GRU"],
        ["attention:", "MultiheadAttention"],
        ["norm:", "InstanceNorm1d"],
    ]
    assert model.same_norm is model.body[1]
    assert find_unsupported(model) == []
    assert model(torch.randn(5, 3)).shape == (5, 4, 3)
    before = {name: id(child) for name, child in model.named_modules()}
    again, more = fix(model)
    assert again is model
    assert more == []
    assert {name: id(child) for name, child in model.named_modules()} == before


def test_fixed_model_loads_its_own_checkpoint() -> None:
    one, other = fix(trained(Model())).module, fix(Model()).module
    other.load_state_dict(one.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(other(x), one(x))


def test_fix_drops_running_statistics_of_instance_norm() -> None:
    norm = trained(nn.InstanceNorm1d(4, affine=True, track_running_stats=True, dtype=F64))
    x = torch.randn(2, 4, 6, dtype=F64)
    expected = copy.deepcopy(norm)(x)
    fixed, _ = fix(norm)
    assert fixed is norm
    torch.testing.assert_close(fixed(x), expected)
    torch.testing.assert_close(fixed.eval()(x), expected)
    assert list(fixed.state_dict()) == ["weight", "bias"]


def test_fix_leaves_frozen_layers_and_subclasses_alone() -> None:
    class OwnNorm(nn.BatchNorm2d):
        pass

    frozen = nn.ModuleList(
        [
            nn.BatchNorm2d(4).eval(),
            nn.LSTM(3, 4),
            nn.MultiheadAttention(4, 2, dropout=0.1),
            nn.InstanceNorm1d(4, track_running_stats=True).eval(),
        ]
    ).requires_grad_(False)
    module = nn.ModuleList([frozen, OwnNorm(4), nn.LSTM(3, 4, proj_size=2), nn.GroupNorm(2, 4), nn.Linear(2, 2)])
    before = list(module.modules())
    fixed, changes = fix(module)
    assert changes == []
    assert all(one is other for one, other in zip(fixed.modules(), before, strict=True))


def test_fix_keeps_mode_type_and_requires_grad() -> None:
    layers = [
        nn.BatchNorm2d(4, dtype=F64),
        nn.LSTM(3, 4, dtype=F64),
        nn.MultiheadAttention(4, 2, dtype=F64),
        nn.MultiheadAttention(4, 2, kdim=3, dtype=F64),
        nn.MultiheadAttention(4, 2, add_bias_kv=True, dtype=F64),
    ]
    layers[0].bias.requires_grad_(False)
    layers[1].weight_hh_l0.requires_grad_(False)
    layers[2].in_proj_weight.requires_grad_(False)
    layers[3].out_proj.weight.requires_grad_(False)
    layers[3].k_proj_weight.requires_grad_(False)
    layers[4].bias_v.requires_grad_(False)
    layers[4].in_proj_bias.requires_grad_(False)
    fixed = fix(nn.ModuleList(layers).eval()).module
    assert not any(child.training for child in fixed.modules())
    assert {p.dtype for p in fixed.parameters()} == {F64}
    frozen = [name for name, p in fixed.named_parameters() if not p.requires_grad]
    assert frozen == [
        "0.bias",
        "1.weight_hh_l0",
        "2.qlinear.weight",
        "2.klinear.weight",
        "2.vlinear.weight",
        "3.klinear.weight",
        "3.out_proj.weight",
        "4.qlinear.bias",
        "4.klinear.bias",
        "4.vlinear.bias",
        "4.seq_bias_v.bias",
    ]


def test_fix_says_that_hooks_are_lost() -> None:
    module = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    module[1].register_forward_hook(lambda *_: None)
    changes = fix(module).changes
    assert [change.endswith("hooks registered on it were not carried over") for change in changes] == [False, True]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_fix_refuses_lazy_layers_that_have_no_parameters_yet() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="Expected layers with initialised parameters, got 1=LazyBatchNorm2d without"):
        fix(module)
    module(torch.randn(2, 3, 5, 5))
    assert type(fix(module).module[1]) is nn.GroupNorm


def test_attention_pickled_by_its_first_name_loads() -> None:
    """Version 0.1 had all of it in ``fix.py``; modules that were saved whole name the class there."""
    from lightning_dp import _replacements

    assert pickle.loads(b"clightning_dp.fix\nSplitMultiheadAttention\n.") is _replacements.SplitMultiheadAttention
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from lightning_dp.fix import Nothing  # noqa: F401
