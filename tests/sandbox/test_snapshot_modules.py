"""A snapshot puts back modules, hooks, optimizers and schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dp.sandbox.snapshot import Snapshot
from tests.cases import each
from tests.sandbox.photo import photo
from tests.sandbox.test_snapshot import Holder


def flip(module: Holder) -> None:
    module.layer.weight.requires_grad_(False)
    module.frozen.requires_grad_(True)


def add_names(module: Any) -> None:
    module.extra = nn.Linear(1, 1)
    module.register_parameter("new", nn.Parameter(torch.ones(1)))
    module.register_buffer("later", torch.ones(1), persistent=False)
    module.note = [1]


#: What user code does to the module itself.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "parameter written through data": lambda m: m.layer.weight.data.fill_(3.0),
    "parameter given other data": lambda m: setattr(m.layer.weight, "data", torch.zeros(5)),
    "parameter replaced": lambda m: setattr(m.layer, "weight", nn.Parameter(torch.zeros(2, 2))),
    "parameter deleted": lambda m: delattr(m.layer, "weight"),
    "frozen parameter written": lambda m: m.frozen.add_(1.0),
    "requires_grad flipped": flip,
    "buffer written": lambda m: m.mean.add_(1.0),
    "buffer replaced": lambda m: setattr(m, "mean", torch.ones(2)),
    "buffer not persistent replaced": lambda m: setattr(m, "hidden", torch.ones(2)),
    "buffer deleted": lambda m: delattr(m, "hidden"),
    "buffer filled that was None": lambda m: setattr(m, "absent", torch.ones(2)),
    "attributes and layers added": add_names,
    "attribute deleted": lambda m: delattr(m, "thing"),
    "layer replaced": lambda m: setattr(m, "layer", nn.Linear(2, 2)),
    "layers reordered": lambda m: m._modules.update(layer=m._modules.pop("layer")),
    "eval": lambda m: m.eval(),
    "cast": lambda m: m.double(),
    "loaded": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
}


@each("name", CHANGES)
def test_module_is_put_back(name: str) -> None:
    module = Holder()
    before = photo(module)
    snapshot = Snapshot([module])
    with torch.no_grad():
        CHANGES[name](module)
    assert photo(module) != before
    snapshot.put_back()
    assert photo(module) == before


@pytest.mark.parametrize("quick", [False, True])
def test_hooks_of_layers_are_put_back(quick: bool) -> None:
    """A step may register them once, and keep an attribute that says so."""
    module, seen = Holder(), list[str]()
    module.layer.register_forward_hook(lambda *_: seen.append("before"))
    snapshot = Snapshot([module])
    module.layer.register_forward_hook(lambda *_: seen.append("after"))
    module.layer.register_forward_pre_hook(lambda *_: seen.append("after"))
    snapshot.put_back(quick=quick)
    module.layer(torch.ones(2))
    assert seen == ["before"]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Rprop])
@pytest.mark.parametrize("kept", [False, True], ids=["root", "kept by the module"])
def test_optimizer_and_scheduler_are_put_back(kind: Any, kept: bool) -> None:
    """Before their first step, when there is no state yet, and after it."""
    module = Holder()
    optimizer = kind(module.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    if kept:
        module.own = [optimizer, scheduler]

    def train() -> None:
        module.layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    roots = [module] if kept else [module, optimizer, scheduler]
    for _ in range(2):
        before = photo(roots)[2:]
        snapshot = Snapshot(roots)
        train()
        optimizer.param_groups[0]["lr"] = 7.0
        optimizer.param_groups[0]["new"] = True
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        optimizer.state[module.frozen]["note"] = torch.ones(1)
        assert photo(roots)[2:] != before
        snapshot.put_back()
        assert photo(roots)[2:] == before
        train()


def test_shared_parameter_is_followed_once() -> None:
    module = Holder()
    module.again = module.layer.weight
    snapshot = Snapshot([module, module])
    with torch.no_grad():
        module.again.zero_()
    snapshot.put_back()
    assert module.again is module.layer.weight is module.tied.weight
    assert bool((module.again != 0).any())
