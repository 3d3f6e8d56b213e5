"""The quick comparison of snapshots: what it finds, and what it leaves to the exact one."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import pytest
import torch

from lightning_dp.sandbox import snapshot
from lightning_dp.sandbox.snapshot import Snapshot
from tests.sandbox.test_snapshot import Holder


def large() -> Holder:
    return Holder(torch.zeros(2**16))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.data.fill_(1.0),
        lambda t: t[1:2].fill_(1.0),
        lambda t: t.data[:2000].fill_(1.0),
        lambda t: setattr(t, "data", torch.ones(2**16)),
    ],
    ids=["data", "one element in place", "a stretch of data", "other data"],
)
def test_quick_finds_what_it_promises(change: Any) -> None:
    """Whatever moves the version of a tensor, and what is written to many of its elements without moving it."""
    module = large()
    snapshot = Snapshot([module])
    place = module.thing.data_ptr()
    change(module.thing)
    snapshot.put_back(quick=True)
    assert not bool(module.thing.any())
    assert module.thing.data_ptr() == place


def test_quick_leaves_to_exact_what_it_misses() -> None:
    """One element written through ``data``; had a quick comparison found it, it would have compared all of them."""
    module = large()
    snapshot = Snapshot([module])
    module.thing.data[500] = 1.0
    snapshot.put_back(quick=True)
    assert int(module.thing.sum()) == 1
    snapshot.put_back()
    assert not bool(module.thing.any())


def test_quick_compares_small_tensors_whole() -> None:
    module = Holder(torch.zeros(2**10))
    snapshot = Snapshot([module])
    module.thing.data[1] = 1.0
    snapshot.put_back(quick=True)
    assert not bool(module.thing.any())


@pytest.mark.parametrize(
    ("thing", "change"),
    [
        ([1], lambda held: held.append(2)),
        ([1], lambda held: held.__setitem__(0, 2)),
        ({1}, lambda held: held.add(2)),
        (deque([1, 2]), lambda held: held.rotate()),
        ({1: 1}, lambda held: held.update({1: 2})),
    ],
    ids=["list", "element", "set", "deque", "dict"],
)
def test_quick_finds_changes_of_every_container(thing: Any, change: Any) -> None:
    module, before = Holder(thing), copy.copy(thing)
    snapshot = Snapshot([module])
    snapshot.put_back(quick=True)
    for _ in range(2):
        change(module.thing)
        assert module.thing != before
        snapshot.put_back(quick=True)
        assert module.thing == before


def test_quick_reads_memory_that_a_view_holds_in_part() -> None:
    module = Holder(torch.zeros(2**10, 2**6)[:, :40])
    snapshot = Snapshot([module])
    module.thing.data[500, 30] = 1.0
    snapshot.put_back(quick=True)
    assert not bool(module.thing.any())


def test_quick_compares_dictionaries_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the host has replaced ``self.log`` since; what changes afterwards is found in every piece."""
    module = Holder(1.0)
    held = Snapshot([module])
    module.__dict__["log"] = print
    held.put_back(quick=True)
    passes = []
    own = snapshot.reset_attributes
    monkeypatch.setattr(snapshot, "reset_attributes", lambda *args: passes.append(1) or own(*args))
    held.put_back(quick=True)
    assert not passes
    for name in ("thing", "other"):
        for _ in range(2):
            setattr(module, name, 2.0)
            held.put_back(quick=True)
            assert module.thing == 1.0
            assert not hasattr(module, "other")
    assert passes
