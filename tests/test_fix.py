"""Layers exchanged for private ones: same outputs where promised, nothing else touched, twice is once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import BinaryAccuracy

from lightning_dp.fix import fix
from lightning_dp.per_sample.independence import find_unsupported
from tests.cases import each

F64 = torch.float64


def trained(module: nn.Module) -> nn.Module:
    """Give every parameter and buffer a value of its own."""
    torch.manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 0.9)
    return module


@each(
    "norm, groups",
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


class Activated(nn.BatchNorm2d):
    """A subclass that writes its norm out, with state of its own and an activation behind it."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        out = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.running_mean is None, 0.1, self.eps
        )
        return self.act(out)


class Shifted(nn.BatchNorm1d):
    """A subclass around its base's ``forward``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1) * 2


class Renamed(nn.BatchNorm2d):
    """A subclass that computes what its base does."""


def test_fix_keeps_what_a_subclass_computes_around_its_norm() -> None:
    module = trained(nn.Sequential(Activated(8), nn.Flatten(), Shifted(8 * 9)).double())
    weight, x = module[0].weight, torch.randn(4, 8, 3, 3, dtype=F64)
    fixed, changes = fix(module)
    assert [change.split(",")[0] for change in changes] == [
        "0: Activated keeps its own forward", "2: Shifted keeps its own forward",
    ]  # fmt: skip
    assert fixed[0].weight is weight
    assert isinstance(fixed[0], Activated)
    first = nn.functional.group_norm(x, 4, weight, fixed[0].bias).relu().flatten(1)
    expected = nn.functional.group_norm(first + 1, 4, fixed[2].weight, fixed[2].bias) * 2
    for training in (True, False):
        torch.testing.assert_close(fixed.train(training)(x), expected)
    torch.testing.assert_close(fixed(x[:1]), expected[:1])
    assert find_unsupported(fixed.train()) == []
    assert fix(fixed).changes == []


def test_fixed_subclass_is_copied_pickled_and_saved() -> None:
    module = fix(trained(nn.Sequential(Activated(8)))).module
    x = torch.randn(2, 8, 3, 3)
    assert list(module.state_dict()) == ["0.weight", "0.bias"]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), module(x))
        assert type(other[0]) is type(module[0])
    other = fix(nn.Sequential(Activated(8))).module
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), module(x))


def test_fix_treats_a_subclass_without_a_forward_as_its_base() -> None:
    fixed, changes = fix(trained(Renamed(32)))
    assert type(fixed) is nn.GroupNorm
    assert fixed.num_groups == 16
    assert changes[0].startswith("the module itself: Renamed became GroupNorm")


def test_fix_leaves_recurrent_layers_and_attention() -> None:
    module = nn.ModuleList([nn.LSTM(3, 4, dropout=0.1, num_layers=2), nn.GRU(3, 4), nn.MultiheadAttention(4, 2)])
    before = list(module.modules())
    assert fix(module).changes == []
    assert all(one is other for one, other in zip(module.modules(), before, strict=True))


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


def test_fix_of_a_lightning_module_is_idempotent() -> None:
    model = trained(Model(width=32))
    kept = {name: child for name, child in model.named_modules() if name in {"", "body", "body.0", "norm", "accuracy"}}
    fixed, changes = fix(model)
    assert fixed is model
    assert {name: fixed.get_submodule(name) for name in kept} == kept
    assert model.hparams == {"width": 32}
    assert model._trainer is None
    assert [change.split(" ")[:2] for change in changes] == [
        ["body.1:", "BatchNorm1d"],
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


def test_fix_leaves_frozen_layers_alone() -> None:
    frozen = nn.ModuleList(
        [
            nn.BatchNorm2d(4).eval(),
            Activated(4).eval(),
            nn.InstanceNorm1d(4, track_running_stats=True).eval(),
        ]
    ).requires_grad_(False)
    module = nn.ModuleList([frozen, nn.GroupNorm(2, 4), nn.Linear(2, 2)])
    before = list(module.modules())
    fixed, changes = fix(module)
    assert changes == []
    assert all(one is other for one, other in zip(fixed.modules(), before, strict=True))


def test_fix_keeps_mode_type_and_requires_grad() -> None:
    layers = [nn.BatchNorm2d(4, dtype=F64), Activated(4).double(), nn.BatchNorm1d(4, dtype=F64)]
    layers[0].bias.requires_grad_(False)
    layers[1].weight.requires_grad_(False)
    fixed = fix(nn.ModuleList(layers).eval()).module
    assert not any(child.training for child in fixed.modules())
    assert {p.dtype for p in fixed.parameters()} == {F64}
    assert [name for name, p in fixed.named_parameters() if not p.requires_grad] == ["0.bias", "1.weight"]


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


def test_fix_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"Expected module to be of type Module, got str\. Pass the network"):
        fix("net")
