"""The watch of what user code writes: each kind of write is reported once, in the forward and after it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_dp.sandbox import randomness
from lightning_dp.sandbox.looks import Look
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.sandbox.writes import When, WriteWatch
from lightning_dp.system.torch_private import Layers

FORWARD = When.FORWARD


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.flag = nn.Linear(2, 2), 0
        self.register_buffer("count", torch.zeros(1))


class Watched:
    """A watch of a module and its optimizer; ``seen`` holds what it has reported last."""

    def __init__(self) -> None:
        self.module = Module()
        self.layers = Layers(self.module)
        self.optimizer = torch.optim.SGD([self.module.layer.weight], lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5)
        self.seen: set[Any] = set()
        self.released = 0
        self.watch = WriteWatch(self._look, self._see, lambda: self.released)
        self.forward(lambda: None)

    def _look(self, last: Look | None) -> Look:
        return Look(self.layers, [self.optimizer, self.scheduler], (), last)

    def _see(self, keys: Any, when: When) -> None:
        self.seen |= {(when, *key) for key in keys}

    def forward(self, write: Any) -> set[Any]:
        self.watch.begin()
        self.seen = set()
        self.watch.begin_forward()
        write()
        self.watch.end_forward()
        return self.seen

    def after(self, write: Any) -> set[Any]:
        self.seen = set()
        write()
        self.watch.read()
        return self.seen

    @torch.no_grad()
    def add(self, *tensors: Any) -> None:
        for tensor in tensors:
            tensor.add_(1)


def test_writes_of_tensors_are_reported_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dp.sandbox.looks._FEW", 0)
    rig = Watched()
    weight, bias, count = rig.module.layer.weight, rig.module.layer.bias, rig.module.count
    assert rig.forward(lambda: rig.add(weight)) == {(FORWARD, "tensor", 0, True, 1, True)}
    assert rig.forward(lambda: rig.add(weight)) == set()
    assert rig.forward(lambda: rig.add(weight, weight)) == {(FORWARD, "tensor", 0, True, 2, True)}
    assert rig.forward(lambda: rig.add(weight, bias)) >= {(FORWARD, "tensor", 1, True, 1, True)}
    assert rig.forward(lambda: rig.add(count)) == {(FORWARD, "tensor", 2, True, 1, True, 1)}
    assert rig.after(lambda: rig.add(weight)) == {(When.HELD, "tensor", 0, True, 1, True)}  # known of forwards only
    rig.released = 1
    assert rig.after(lambda: rig.add(weight)) == {(When.RELEASED, "tensor", 0, True, 1, True)}
    assert rig.after(lambda: rig.add(weight)) == set()


def test_writes_of_few_tensors_are_reported_each_time() -> None:
    rig = Watched()
    for _ in range(2):
        assert rig.forward(lambda: rig.add(rig.module.count)) == {(FORWARD, "tensor", 2, True, 1, True, 1)}


def test_a_batch_begins_once_until_its_forward_ends() -> None:
    rig = Watched()
    look = rig.watch.begin()
    rig.module.flag = 1
    rig.seen = set()
    assert rig.watch.begin() is look
    assert rig.forward(lambda: None) == {(FORWARD, "attribute", 0, "flag", 1)}
    assert rig.watch.begin() is not look


def test_replaced_tensors_are_reported_each_time() -> None:
    rig = Watched()

    def move() -> None:
        rig.module.layer.weight.data = rig.module.layer.weight.data.clone()

    def replace() -> None:
        rig.module.count = torch.zeros(1)

    for _ in range(2):
        assert {(FORWARD, "tensor", 0, True, 0, False)} <= rig.forward(move)
        assert any(key[:4] == (FORWARD, "tensor", 2, False) for key in rig.forward(replace))


def test_numbers_attributes_and_modes_are_reported() -> None:
    rig = Watched()
    group = rig.optimizer.param_groups[0]
    assert rig.forward(lambda: group.update(lr=0.5)) == {(FORWARD, "number", ((0, 0), "lr"))}
    assert rig.forward(lambda: vars(rig.scheduler).update(last_epoch=7)) == {
        (FORWARD, "number", ((1, 0), "last_epoch"), 7)
    }
    more = {"params": [rig.module.layer.bias], "lr": 0.3}
    assert (FORWARD, "number", ((0, 1), "lr")) in rig.forward(lambda: rig.optimizer.add_param_group(more))
    assert rig.forward(lambda: setattr(rig.module, "flag", 1000)) == {(FORWARD, "attribute", 0, "flag", 1000)}
    assert rig.forward(lambda: setattr(rig.module, "flag", float("1000"))) == {(FORWARD, "attribute", 0, "flag")}
    assert rig.forward(lambda: setattr(rig.module, "flag", float("1000"))) == set()
    assert {(FORWARD, "mode", 0, False), (FORWARD, "mode", 1, False)} <= rig.forward(rig.module.eval)
    assert rig.forward(lambda: rig.module.layer.requires_grad_(False)) == {
        (FORWARD, "trains", 0, False),
        (FORWARD, "trains", 1, False),
    }
    assert (FORWARD, "layer", 1) in rig.forward(lambda: setattr(rig.module, "layer", nn.Linear(2, 2)))


@pytest.mark.parametrize("values", [range(1, 9), [True, False] * 4, ["a", "b"] * 4, [0.5**n for n in range(8)]])
def test_another_step_of_a_count_is_reported(values: Any) -> None:
    rig = Watched()

    def num_new(values: Any) -> int:
        found = set()
        for value in values:
            found |= rig.forward(lambda value=value: setattr(rig.module, "flag", value))
        return len(found)

    assert num_new(values) == (1 if isinstance(values, range) or isinstance(values[0], float) else 2)
    if isinstance(values, range):
        assert num_new(rig.module.flag + 10**n for n in range(2, 8)) == 4  # three steps, and all that follow


KEPT: dict[str, tuple[Any, Any]] = {
    "list": (lambda: [0.5], lambda kept, step: kept.extend([0.5] * step)),
    "long list": (lambda: [0.5] * 20, lambda kept, step: kept.extend([0.5] * step)),
    "dictionary": (lambda: {"seen": 0}, lambda kept, step: kept.update(seen=kept["seen"] + step)),
    "tensor": (lambda: torch.zeros(()), lambda kept, step: kept.add_(step)),
    "buffer": (None, None),
}


@pytest.mark.parametrize("name", KEPT)
def test_another_step_of_what_is_kept_is_reported(name: str) -> None:
    rig = Watched()
    make, change = KEPT[name]
    if make is None:
        kept, change = rig.module.count, KEPT["tensor"][1]
    else:
        rig.module.kept = kept = make()
    rig.forward(lambda: None)
    keys = [rig.forward(lambda step=step: change(kept, step)) for step in (1, 1, 8)]
    assert [len(key) for key in keys] == [1, 1, 1]
    assert keys[0] == keys[1] != keys[2]


def test_writes_to_what_optimizers_keep_are_reported() -> None:
    rig = Watched()
    mean, square = torch.zeros(2), torch.zeros(2)
    state = rig.optimizer.state[rig.module.layer.weight]
    assert rig.forward(lambda: state.update(mean=mean, square=square)) == {(FORWARD, "states", 2, 0)}
    assert rig.forward(lambda: None) == set()
    assert rig.forward(lambda: rig.add(mean)) == {(FORWARD, "states", (1, 0))}
    assert rig.forward(lambda: rig.add(square)) == {(FORWARD, "states", (0, 1))}
    assert rig.forward(lambda: rig.add(mean, mean)) == {(FORWARD, "states", (2, 0))}
    assert rig.forward(lambda: state.update(mean=torch.zeros(2))) == {(FORWARD, "states", 0, 1)}
    assert rig.forward(rig.optimizer.state.clear) == {(FORWARD, "states", -2, 0)}


def test_an_earlier_state_comes_back_without_values_of_tensors() -> None:
    rig = Watched()
    layer, owner, mean = rig.module.layer, {"done": False}, torch.zeros(2)
    rig.optimizer.state[layer.weight]["mean"] = mean
    look = Look(rig.layers, [rig.optimizer, rig.scheduler], [owner])
    rig.module.flag, rig.module.new, owner["done"] = 7, 1, True
    layer.eval().weight.requires_grad_(False).zero_()
    rig.module.layer, rig.optimizer.param_groups[0]["lr"] = nn.Linear(2, 2), 9.0
    replaced = rig.module.layer
    rig.optimizer.state.clear()
    hook = rig.module.register_forward_hook(lambda *_: None)
    with look.back_in():
        assert not rig.module._forward_hooks  # an attribute may say that there are some
        assert rig.optimizer.state[layer.weight] == {"mean": mean}
        assert (rig.module.flag, hasattr(rig.module, "new"), owner) == (0, False, {"done": False})
        assert (rig.module.layer is layer, layer.training, layer.weight.requires_grad) == (True, True, True)
        assert (float(layer.weight.detach().sum()), rig.optimizer.param_groups[0]["lr"]) == (0.0, 0.1)
    assert (rig.module.flag, rig.module.new, owner, rig.module.layer is replaced) == (7, 1, {"done": True}, True)
    assert [*rig.module._forward_hooks] == [hook.id]
    assert (layer.training, layer.weight.requires_grad) == (True, True)  # no part of the module any more
    assert (rig.optimizer.param_groups[0]["lr"], len(rig.optimizer.state)) == (9.0, 0)


def test_what_was_none_stays_after_earlier_numbers_were_back() -> None:
    rig = Watched()
    owner: dict[str, Any] = {"cache": None, "count": 0}
    look = Look(rig.layers, [], [owner])
    owner |= {"cache": (cache := torch.zeros(2)), "count": 1, "new": 2, "more": cache}
    now = owner.copy()
    with look.numbers_back_in():
        assert owner == {"cache": None, "count": 0, "more": cache}
    assert owner == now


SEEDS: dict[str, Any] = {"torch": torch.manual_seed, "numpy": np.random.seed, "Python": random.seed}


@pytest.mark.parametrize("name", SEEDS)
def test_another_seed_is_reported_once(name: str) -> None:
    rig = Watched()
    step = (5, 1) if name == "torch" else ()  # of the others, no number is seen
    assert rig.forward(lambda: SEEDS[name](5)) == {(FORWARD, "seed", name, *step[:1])}
    assert rig.forward(lambda: SEEDS[name](6)) == ({(FORWARD, "seed", name, *step[1:])} if step else set())
    assert rig.forward(lambda: SEEDS[name](7)) == set()


def test_draws_of_any_number_are_no_seeds() -> None:
    rig = Watched()

    def draw() -> None:
        torch.rand(10_000)
        np.random.rand(100_000)  # noqa: NPY002
        [random.random() for _ in range(10_000)]

    assert rig.forward(draw) == set()
    with torch.random.fork_rng(devices=[]):
        assert rig.forward(draw) == set()


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_are_equal_where_more_is_drawn(name: str) -> None:
    SEEDS[name](5)
    early = randomness.seeds()[name]
    torch.rand(3), np.random.rand(3_000), [random.random() for _ in range(3_000)]  # noqa: NPY002
    late = randomness.seeds()[name]
    assert early == late
    assert late == early
    SEEDS[name](6)
    assert early != randomness.seeds()[name]


def test_words_of_python_are_read_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(5)
    assert randomness._PYTHON is not None  # of CPython
    found = randomness.seeds()["Python"]
    monkeypatch.setattr(randomness, "_PYTHON", None)
    assert found == randomness.seeds()["Python"]
    random.seed(6)
    assert found != randomness.seeds()["Python"]


@pytest.mark.parametrize("way", [Look.back_in, Look.numbers_back_in])
@pytest.mark.parametrize("names", [["weight"], ["weight", "bias"]])
def test_layers_get_parameters_of_other_names_back(names: list[str], way: Any) -> None:
    """As before and after ``ModelPruning``, which registers hooks, and sets attributes in place of parameters."""
    layer = nn.Linear(2, 2)
    layers, parameter = Layers(layer), layer.weight
    look = Look(layers, [])
    for name in names:
        prune.l1_unstructured(layer, name, amount=0.5)
    saved, pruned, look_at_pruned = {*layer.state_dict()}, layer.weight, Look(layers, [])
    with way(look):
        assert {*layer.state_dict()} == {"weight", "bias"}
        assert layer(torch.ones(1, 2)).grad_fn is not None
        assert layer.weight is parameter
    assert {*layer.state_dict()} == saved
    assert layer.weight is pruned
    for name in names:
        prune.remove(layer, name)
    with way(look_at_pruned):
        snapshot = Snapshot([layer])
        assert {*layer.state_dict()} == saved
        layer(torch.ones(1, 2))
        snapshot.put_back()
    assert {*layer.state_dict()} == {"weight", "bias"}
    assert layer.weight is parameter


@pytest.mark.parametrize("way", [Look.back_in, Look.numbers_back_in])
def test_a_layer_without_its_parametrization_stays_so(way: Any) -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    look = Look(Layers(layer), [])
    parametrize.remove_parametrizations(layer, "weight")
    with way(look):
        assert layer(torch.ones(1, 2)).grad_fn is not None
    assert {*layer.state_dict()} == {"weight", "bias"}
