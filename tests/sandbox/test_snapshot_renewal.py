"""A snapshot that is taken again in the same memory, and the comparison of objects by the names of their attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_dp.sandbox.sandbox import Sandbox, StepGuard
from lightning_dp.sandbox.snapshot import Snapshot


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.large = nn.Linear(2, 1), nn.Parameter(torch.zeros(2**16))
        self.register_buffer("mean", torch.zeros(2))
        self.first, self.seen, self.mode = True, [1.0], {"a": True}


def _values(module: nn.Module) -> list[Any]:
    return [each.clone() for each in module.state_dict().values()]


def _write(module: Model, value: float) -> None:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(value)
        module.large.data[500] = value + 1


@pytest.mark.parametrize("quick", [False, True])
def test_renewed_snapshot_puts_back_the_later_values(quick: bool) -> None:
    module = Model()
    snapshot = Snapshot([module])
    for value in (1.0, 3.0):
        _write(module, value)
        assert snapshot.renew([module])
        later = _values(module)
        _write(module, value + 1)
        module.seen.append(2.0)
        snapshot.put_back(quick=quick)
        assert all(map(torch.equal, _values(module), later))
        assert module.seen == [1.0]


CHANGES: dict[str, Callable[[Model], Any]] = {
    "number": lambda module: setattr(module, "first", False),
    "another attribute": lambda module: setattr(module, "second", 1),
    "element": lambda module: module.seen.append(2.0),
    "replaced list": lambda module: setattr(module, "seen", [1.0]),
    "replaced parameter": lambda module: setattr(module, "large", nn.Parameter(module.large.detach())),
    "other memory": lambda module: setattr(module.mean, "data", torch.zeros(2)),
    "frozen": lambda module: module.layer.requires_grad_(False),
    "part of a graph": lambda module: module.mean.add_(module.layer.weight[0]),
    "array": lambda module: setattr(module, "first", np.zeros(2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_snapshot_of_other_objects_is_not_renewed(change: Callable[[Model], Any]) -> None:
    module = Model()
    snapshot = Snapshot([module])
    assert snapshot.renew([module])
    change(module)
    assert not snapshot.renew([module])


def test_snapshot_is_renewed_for_the_same_roots_alone() -> None:
    module, other = Model(), Model()
    snapshot = Snapshot([module])
    assert not snapshot.renew([module, other])
    assert not snapshot.renew([other])


@pytest.mark.parametrize(
    "kept", [np.zeros(2), torch.Generator(), torch.eye(2).to_sparse()], ids=["array", "generator", "sparse"]
)
def test_state_without_a_comparison_is_not_renewed(kept: Any) -> None:
    module = Model()
    module.kept = kept
    assert not Snapshot([module]).renew([module])


def test_series_begins_from_the_state_between() -> None:
    """Also where objects were replaced between two series, so that the snapshot of the first cannot be used again."""
    module = Model()
    sandbox = Sandbox(module, StepGuard(lambda optimizer: True), list, torch.no_grad)
    for number in range(4):
        _write(module, float(number))
        module.seen = [float(number)] if number > 1 else module.seen
        before, seen = _values(module), [*module.seen]
        with sandbox.series() as piece:
            for _ in range(2):
                with piece():
                    assert all(map(torch.equal, _values(module), before))
                    _write(module, -1.0)
                    module.seen.append(-1.0)
        assert all(map(torch.equal, _values(module), before))
        assert module.seen == seen


def _rename(module: Model) -> None:
    del module.first
    module.second = True


def _rename_key(module: Model) -> None:
    module.mode["b"] = module.mode.pop("a")


@pytest.mark.parametrize("change", [_rename, _rename_key], ids=["attribute", "key"])
def test_quick_finds_another_name_of_the_same_value(change: Callable[[Model], None]) -> None:
    module = Model()
    snapshot = Snapshot([module])
    for _ in range(2):
        change(module)
        snapshot.put_back(quick=True)
        assert module.first is True
        assert not hasattr(module, "second")
        assert module.mode == {"a": True}
