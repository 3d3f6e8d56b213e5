"""What is private of torch, and of Lightning's samplers, still means what the package takes it for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper
from torch import nn
from torch.utils.data import SequentialSampler

from lightning_dp.system import torch_private
from tests.cases import each


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d])
def test_norms_with_statistics_have_one_base(kind: type[nn.Module]) -> None:
    assert isinstance(kind(3), torch_private.NormWithStatistics)
    assert isinstance(nn.LazyBatchNorm1d(), torch_private.NormWithStatistics)
    assert not isinstance(nn.LayerNorm(3), torch_private.NormWithStatistics)


def test_batch_and_instance_norms_are_told_apart() -> None:
    for norm in (nn.BatchNorm1d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d()):
        assert isinstance(norm, torch_private.BatchNorm)
        assert not isinstance(norm, torch_private.InstanceNorm)
    for norm in (nn.InstanceNorm1d(3), nn.InstanceNorm3d(3), nn.LazyInstanceNorm2d()):
        assert isinstance(norm, torch_private.InstanceNorm)
        assert not isinstance(norm, torch_private.BatchNorm)


def test_replace_children_changes_the_module() -> None:
    shared = nn.Linear(2, 2)
    module = nn.Sequential(shared, shared)
    children = torch_private.replace_children(module)
    assert list(children) == ["0", "1"]  # a module that is registered twice is there twice
    children["1"] = nn.ReLU()
    assert isinstance(module[1], nn.ReLU)
    assert module[0] is shared


def test_num_changes_counts_writes_in_place() -> None:
    tensor = torch.zeros(2)
    before = torch_private.num_changes(tensor)
    tensor.add_(1)
    assert torch_private.num_changes(tensor) == before + 1
    with torch.inference_mode():
        frozen = torch.zeros(2)
        assert torch_private.num_changes(frozen) == -1
    assert torch_private.changes_of([tensor, torch.zeros(2)]) == (before + 1, 0)
    assert torch_private.changes_of([tensor, frozen]) == (before + 1, -1)


def test_parameters_have_the_names_that_torch_gives() -> None:
    shared, deep = (
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())),
    )
    module = nn.ModuleDict({"a": deep, "b": shared, "c": nn.Sequential(shared, deep[1]), "d": nn.LSTM(2, 2)})
    module.register_parameter("own", nn.Parameter(torch.ones(1)))
    module.register_parameter("absent", None)
    module["b"].again = deep[0].weight
    deep.register_module("missing", None)
    assert torch_private.Layers(module).named_parameters() == [*module.named_parameters()]
    assert len(torch_private.Layers(module).named_parameters()) == 10

    class Renamed(nn.Linear):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return ((f"my_{name}", parameter) for name, parameter in super().named_parameters(*args, **kwargs))

    assert [name for name, _ in torch_private.Layers(Renamed(2, 2)).named_parameters()] == ["my_weight", "my_bias"]


def test_saved_buffers_are_those_of_the_state_dict() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    module.register_buffer("kept", torch.ones(1))
    module[1].register_buffer("dropped", torch.ones(1), persistent=False)
    module[1].register_buffer("absent", None)
    found = dict(torch_private.saved_buffers(module))
    assert found.keys() == module.state_dict().keys() - dict(module.named_parameters()).keys()
    assert found["kept"] is module.kept


def test_wrapped_sampler_is_the_users_own() -> None:
    sampler = SequentialSampler(range(4))
    wrapper = UnrepeatedDistributedSamplerWrapper(sampler, num_replicas=1, rank=0)
    assert torch_private.wrapped_sampler(wrapper) is sampler


def test_without_hooks_silences_leaves_and_puts_hooks_back() -> None:
    leaf, seen = torch.ones(2, requires_grad=True), []
    leaf.register_hook(lambda gradient: seen.append("hook"))
    leaf.register_post_accumulate_grad_hook(lambda tensor: seen.append("after"))
    with torch_private.without_hooks([leaf, torch.ones(1, requires_grad=True)]):
        leaf.sum().backward()
    assert seen == []
    leaf.sum().backward()
    assert seen == ["hook", "after"]


def test_layers_and_their_tensors_are_found_once_each() -> None:
    shared = nn.BatchNorm1d(2)
    module = nn.Sequential(shared, nn.Sequential(nn.Linear(2, 2), shared), nn.Linear(2, 2, bias=False))
    module[2].weight = module[1][0].weight
    module.register_module("absent", None)
    layers = torch_private.Layers(module)
    assert layers.own == []
    _check_layers(layers, module)


def test_layers_of_torch_with_rates_or_attributes_are_looked_at() -> None:
    module = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(), nn.GRUCell(2, 2), nn.GELU())
    layers = torch_private.Layers(module)
    assert layers.own == [module[1]]
    module[0].mean = torch.ones(1)
    assert layers.now().own == [module[0], module[1]]


def _check_layers(layers: torch_private.Layers, module: nn.Module) -> None:
    assert [*map(id, layers.now().all)] == [*map(id, module.modules())]
    assert [*map(id, layers.parameters())] == [*map(id, module.parameters())]
    assert [*map(id, layers.buffers())] == [*map(id, module.buffers())]
    assert layers.named_parameters() == [*module.named_parameters()]


class _Own(nn.Sequential):
    """A class that torch does not define."""


_CHANGES = {
    "exchanged": lambda module: module.__setitem__(0, nn.Linear(3, 3)),
    "exchanged within": lambda module: module[0].__setitem__(1, nn.BatchNorm1d(2)),
    "added": lambda module: module[1][0].register_module("more", nn.Linear(2, 2)),
    "removed": lambda module: module.__delitem__(2),
    "removed at the end of a layer": lambda module: module[0].pop(-1),
    "set to None": lambda module: module.__setitem__(1, None),
    "renamed": lambda module: module[0]._modules.__setitem__("other", module[0]._modules.pop("1")),
    "moved": lambda module: module[1]._modules.update({"0": module[0].pop(-1), "1": module[1][0]}),
    "moved under its name": lambda module: setattr(
        module[1], "_modules", {"1": module[0].pop(-1), **module[1]._modules}
    ),
    "another dictionary": lambda module: setattr(module[0], "_modules", {"0": nn.Bilinear(2, 2, 2)}),
    "another parameter": lambda module: setattr(module[0][0], "weight", nn.Parameter(torch.ones(1))),
    "another buffer": lambda module: module[2].register_buffer("mean", torch.ones(1)),
}


@each("change", _CHANGES)
def test_layers_follow_changes_of_the_module(change: str) -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), _Own(nn.Linear(2, 1)), nn.InstanceNorm1d(2))
    layers = torch_private.Layers(module)
    _check_layers(layers, module)
    assert layers.own == [module[1]]
    _CHANGES[change](module)
    _check_layers(layers, module)
    _check_layers(layers, module)
    assert layers.own == [layer for layer in module.modules() if isinstance(layer, _Own)]


ROWS = torch.ones(4, 3, requires_grad=True)
LABELS = torch.tensor([0, 1, 2, -100])
REDUCTIONS = {
    "sum": (lambda rows: rows.sum(), 1),
    "mean": (lambda rows: rows.mean(), 12),
    "loss": (lambda rows: nn.functional.mse_loss(rows, torch.zeros(4, 3)), 12),
    "summed": (lambda rows: nn.functional.mse_loss(rows, torch.zeros(4, 3), reduction="sum"), 1),
    "labels": (lambda rows: nn.functional.cross_entropy(rows, LABELS), 3),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_divisors_of_reductions_are_read(name: str) -> None:
    reduce, divisor = REDUCTIONS[name]
    node: Any = reduce(ROWS * 2).grad_fn
    before, number = node.next_functions[0]
    assert torch_private.size_of_result(before, number) == 12
    assert float(torch_private.divisor_of(node, 12)) == divisor
    assert torch_private.size_of_result(node, 0) == 1
    assert torch_private.size_of_result(node, 1) == 0


def test_num_hooks_counts_hooks_on_tensors_and_modules() -> None:
    before, tensor, layer = torch_private.num_hooks(), torch.ones(1, requires_grad=True), nn.Linear(1, 1)
    (tensor * 2).register_hook(lambda gradient: gradient)  # type: ignore[no-untyped-call]
    layer.register_full_backward_hook(lambda *args: None)
    assert torch_private.num_hooks() == before + 2


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_is_lazy_layer_until_the_first_call() -> None:
    layer, plain = nn.LazyLinear(2), nn.Linear(3, 2)
    assert torch_private.is_lazy_layer(layer)
    assert not torch_private.is_lazy_layer(plain)
    layer.load_state_dict(plain.state_dict())
    assert torch_private.is_lazy_layer(layer)
    layer(torch.ones(1, 3))
    assert not torch_private.is_lazy_layer(layer)


def test_watch_nonzero_sees_rows_that_masks_choose() -> None:
    sizes: list[tuple[int, int]] = []
    rows = torch.arange(12.0).reshape(4, 3).requires_grad_()
    mask = rows[:, 0] > 2
    plain = [rows[mask], rows[:, mask[1:]], mask.nonzero(), (rows > 4).nonzero(), *torch.where(rows > 4)]
    end = torch_private.watch_nonzero(lambda mask, found: sizes.append((mask.numel(), len(found))))
    seen = [rows[mask], rows[:, mask[1:]], mask.nonzero(), (rows > 4).nonzero(), *torch.where(rows > 4)]
    end()
    _ = rows[mask]
    assert sizes == [(4, 3), (3, 3), (4, 3), (12, 7), (12, 7)]
    assert all(torch.equal(one, two) and one.stride() == two.stride() for one, two in zip(plain, seen, strict=True))
