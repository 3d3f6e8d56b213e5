"""What user code keeps is looked into, however deep: each change is reported, and comes back with an earlier look."""

from __future__ import annotations

import array
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from lightning_dp.sandbox.contents import Contents
from lightning_dp.sandbox.variables import Variables
from tests.cases import each


def written(before: Contents, after: Contents) -> list[Any]:
    return [key for key, _, _ in before.writes_until(after)]


FLAGS = ("flag", "missing")


class Thing:
    shared = False

    def __init__(self) -> None:
        self.flag: Any = False


class Slotted:
    __slots__ = ("flag",)

    def __init__(self) -> None:
        self.flag = False


class Words(list[int]):
    pass


def nested() -> Any:
    return {"one": [types.SimpleNamespace(two=(0, Thing()))]}


class Making(OrderedDict[str, Any]):
    """Makes an object of the class that it stores, as mappings of transformers do."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


def show(kept: Any) -> Any:
    """Return what something holds, comparable."""
    if isinstance(kept, (torch.Tensor, np.ndarray, set)):
        return [*kept.flatten().tolist()] if not isinstance(kept, set) else sorted(kept)
    if isinstance(kept, (dict, list, tuple, deque, bytearray, array.array)):
        own = sorted(vars(kept).items()) if isinstance(kept, Words) else []
        return [*map(show, kept.items() if isinstance(kept, dict) else kept), *own]
    if isinstance(kept, Slotted):
        return kept.flag
    return {name: show(one) for name, one in vars(kept).items()} if hasattr(kept, "__dict__") else kept


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "list": (lambda: [1], lambda kept: kept.append(2)),
    "entry of a list": (lambda: [1], lambda kept: kept.__setitem__(0, 2)),
    "dict": (dict, lambda kept: kept.update(a=1)),
    "key": (lambda: {"a": 1}, lambda kept: kept.update(b=kept.pop("a"))),
    "set": (set, lambda kept: kept.add(1)),
    "element": (lambda: {1}, lambda kept: (kept.remove(1), kept.add(2))),
    "deque": (lambda: deque([1], maxlen=1), lambda kept: kept.append(2)),
    "counter": (Counter, lambda kept: kept.update("a")),
    "default": (lambda: defaultdict(int), lambda kept: kept["a"]),
    "order": (OrderedDict, lambda kept: kept.update(a=1)),
    "own list": (Words, lambda kept: kept.append(1)),
    "attribute of a list": (Words, lambda kept: setattr(kept, "flag", True)),
    "bytes": (lambda: bytearray(2), lambda kept: kept.__setitem__(0, 1)),
    "array": (lambda: array.array("i", [1, 1000]), lambda kept: kept.__setitem__(1, 1001)),
    "numpy": (lambda: np.zeros(3), lambda kept: kept.__setitem__(0, 1)),
    "tensor": (lambda: torch.zeros(3), lambda kept: kept.add_(1)),
    "object": (Thing, lambda kept: setattr(kept, "flag", True)),
    "new attribute": (Thing, lambda kept: setattr(kept, "other", 1)),
    "lost attribute": (Thing, lambda kept: delattr(kept, "flag")),
    "slots": (Slotted, lambda kept: setattr(kept, "flag", True)),
    "namespace": (types.SimpleNamespace, lambda kept: setattr(kept, "flag", True)),
    "deep": (nested, lambda kept: setattr(kept["one"][0].two[1], "flag", True)),
    "deep list": (lambda: ([[0]],), lambda kept: kept[0][0].append(1)),
    "tensor in a list": (lambda: [torch.zeros(2)], lambda kept: kept[0].add_(1)),
}


@each("name", CHANGES)
def test_a_change_is_reported_and_comes_back(name: str) -> None:
    make, change = CHANGES[name]
    holder = {"kept": make()}
    first = Contents([holder], [], ())
    before, shown = Contents([holder], [], (), first), show(holder)
    assert not written(first, before)
    change(holder["kept"])
    after, changed = Contents([holder], [], (), before), show(holder)
    assert [key[1:3] for key in written(before, after)] == [(0, "kept")]
    assert shown != changed
    with before.back_in():
        assert show(holder) == shown
    assert show(holder) == changed


def test_attributes_of_classes_are_reported() -> None:
    holder = {"kept": Thing()}
    before = Contents([holder], [], ())
    try:
        Thing.shared = True
        assert written(before, Contents([holder], [], (), before)) == [("attribute", "Thing", "shared")]
        with before.back_in():
            assert not Thing.shared
        assert Thing.shared
    finally:
        Thing.shared = False


def test_what_changes_hold_is_looked_into_later() -> None:
    holder: dict[str, Any] = {"kept": Thing()}
    first = Contents([holder], [], ())
    holder["kept"].flag = inner = Thing()
    second = Contents([holder], [], (), first)
    inner.flag = True
    assert written(second, Contents([holder], [], (), second)) == [("attribute", 0, "kept", "flag", "flag")]
    third = Contents([holder], [], (), second)
    vars(holder["kept"])["flag"] = None
    holder["kept"].__dict__ = {"flag": inner}
    fourth = Contents([holder], [], (), third)
    inner.flag = False
    assert written(fourth, Contents([holder], [], (), fourth)) == [("attribute", 0, "kept", "flag", "flag")]


def test_large_containers_and_many_objects_are_watched_in_part() -> None:
    large: dict[str, Any] = {"kept": [*range(17)]}
    before = Contents([large], [], ())
    large["kept"][0] = 5
    assert not written(before, Contents([large], [], (), before))
    large["kept"].append(1)
    assert written(before, Contents([large], [], (), before)) == [("content", 0, "kept")]
    many: dict[str, Any] = {str(number): Thing() for number in range(200)}
    before = Contents([many], [], ())
    many["0"].flag = many["199"].flag = True
    assert written(before, Contents([many], [], (), before)) == [("attribute", 0, "0", "flag")]


def test_equal_numbers_in_other_objects_are_no_change() -> None:
    holder: dict[str, Any] = {"kept": [1.5], "number": 1000.5}
    before = Contents([holder], [], ())
    holder["kept"][0], holder["number"] = float("1.5"), float("1000.5")
    assert not written(before, Contents([holder], [], (), before))


def test_new_objects_are_reported() -> None:
    one, other = {"kept": 1}, {"kept": 2}
    before = Contents([one], [], ())
    assert written(before, Contents([one, other], [], (), before)) == [("object", 1)]


def test_a_mapping_keeps_what_it_stores() -> None:
    making = Making(one=Thing)
    holder = {"making": making}
    before = Contents([holder], [], [])
    making["one"] = Slotted
    assert written(before, Contents([holder], [], [])) == [("content", 0, "making")]
    with before.back_in():
        assert OrderedDict.__getitem__(making, "one") is Thing
    assert OrderedDict.__getitem__(making, "one") is Slotted
    assert written(Contents([holder], [], []), Contents([holder], [], [])) == []


def test_quiet_holders_are_compared_at_once() -> None:
    """Variables, objects and containers, each after it has stayed the same for a while."""
    kept, held, named = [1.5], {"a": "one"}, {"flag": 1, "other": 2}
    roots: list[Any] = [{"kept": kept, "held": held, "thing": Thing()}, Variables.of_dict(named, frozenset(FLAGS))]
    changes: dict[Any, Callable[[], Any]] = {
        ("content", 0, "kept"): lambda: kept.append(2.5),
        ("content", 0, "held"): lambda: held.update(a="two"),
        ("attribute", 0, "thing", "flag"): lambda: setattr(roots[0]["thing"], "flag", 7),
        ("attribute", 1, FLAGS[0]): lambda: named.update({FLAGS[0]: 5}),
        ("attribute", 1, FLAGS[1]): lambda: named.update({FLAGS[1]: 1}),
    }
    last = Contents(roots, [], ())
    for key, change in changes.items():
        named["other"] += 1  # is not looked at
        same = Contents(roots, [], (), Contents(roots, [], (), last))
        assert not written(last, same)
        change()
        last = Contents(roots, [], (), same)
        assert written(same, last) == [key]


def test_the_name_of_a_hook_is_no_write() -> None:
    """Lightning sets it before each hook; what else an object holds is not copied for that."""
    live = {"_current_fx_name": "training_step", "flag": False}
    looks = [Contents([live], [], ())]
    for name, flag in (("on_after_backward", False), (None, False), ("training_step", True)):
        live.update(_current_fx_name=name, flag=flag)
        looks.append(Contents([live], [], (), looks[-1]))
    holders = [look.holders[id(live)] for look in looks]
    assert holders[0] is holders[1] is holders[2] is not holders[3]
    assert [written(*pair) for pair in pairwise(looks)] == [[], [], [("attribute", 0, "flag")]]
