"""A snapshot puts back the values of classes, and what cannot be counted or read."""

from __future__ import annotations

from collections import OrderedDict, UserList
from typing import Any

import torch

from lightning_dp.sandbox.snapshot import Snapshot
from tests.sandbox.test_snapshot import Holder


class Uncounted(tuple):
    """A tuple whose length has another meaning, as the irreducible representations of e3nn."""

    def __len__(self) -> int:
        raise NotImplementedError


def test_tuple_that_refuses_to_be_counted_is_followed() -> None:
    module, state = Holder(), [1]
    module.thing = Uncounted((state,))
    snapshot = Snapshot([module])
    state.append(2)
    snapshot.put_back()
    assert state == [1]


class Unset(UserList[int]):
    """A list that cannot be read while it is unset, as an optional one of omegaconf."""

    def __init__(self) -> None:
        super().__init__()
        self.data = None  # type: ignore[assignment]


def test_container_that_cannot_be_read_is_put_back() -> None:
    module, unset = Holder(), Unset()
    module.thing = {"sizes": unset}
    snapshot = Snapshot([module])
    unset.data = [1]
    module.thing["sizes"] = [2]
    snapshot.put_back()
    assert module.thing["sizes"] is unset
    assert unset.data is None


class Loading(OrderedDict[str, Any]):
    """A mapping that loads what it is asked for, as that from configurations to models of transformers."""

    def _load(self, *given: Any) -> Any:
        raise AssertionError("a snapshot asks for nothing that is not stored")

    __len__ = __iter__ = keys = values = items = __getitem__ = _load


def test_mapping_that_loads_on_demand_is_put_back_unread() -> None:
    module, loading = Holder(), Loading()
    OrderedDict.__setitem__(loading, "one", inner := [1])
    OrderedDict.__setitem__(loading, "two", 2)
    module.thing = loading
    snapshot = Snapshot([module])
    inner.append(7)
    OrderedDict.move_to_end(loading, "one")
    OrderedDict.__setitem__(loading, "two", 3)
    snapshot.put_back()
    assert [*OrderedDict.__iter__(loading)] == ["one", "two"]
    assert [dict.__getitem__(loading, key) for key in ("one", "two")] == [[1], 2]


def add_to_class(module: Any) -> None:
    kind = type(module)
    kind.seen.append(1)
    kind.mass.add_(1.0)
    kind.count += 1
    kind.later = 1
    kind.describe = lambda self: "a method is no state"


def test_values_of_classes_are_put_back() -> None:
    class Base(Holder):
        seen: list[int] = []  # noqa: RUF012, as users write it
        mass = torch.zeros(2)

    class Own(Base):
        count = 0

        def describe(self) -> str:
            return ""

    module = Own()
    snapshot = Snapshot([module])
    for quick in (True, False, True):
        add_to_class(module)
        snapshot.put_back(quick=quick)
        assert (Own.seen, Own.mass.tolist(), Own.count) == ([], [0.0, 0.0], 0)
        assert not hasattr(Own, "later")
        assert "seen" not in vars(Own)
        assert module.describe() == "a method is no state"
    assert snapshot.renew([module])
