"""A snapshot puts everything back: every kind of state that user code keeps, by value and in the same objects."""

from __future__ import annotations

import array
import itertools
import random
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dp.sandbox.kept_tensors import same_values
from lightning_dp.sandbox.snapshot import Snapshot, few_places
from tests.cases import each
from tests.sandbox.photo import photo


class Words(list):  # type: ignore[type-arg]
    """A list with an attribute."""


class Slotted:
    __slots__ = ("__hidden", "late", "value")

    def __init__(self) -> None:
        self.value, self.__hidden = [1.0], 2.0

    def hide(self, value: float) -> None:
        self.__hidden = value


class OneSlot(Slotted):
    __slots__ = "single"

    def __init__(self) -> None:
        super().__init__()
        self.single = torch.ones(2)


@dataclass
class Running:
    mean: Tensor = field(default_factory=lambda: torch.zeros(2))
    seen: list[int] = field(default_factory=list)
    count: int = 0


@dataclass(frozen=True)
class Frozen:
    inner: Running = field(default_factory=Running)


Pair = namedtuple("Pair", "left right")


def changed(operation: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Apply an operation to ``module.thing``."""

    def change(module: Any) -> None:
        operation(module.thing)

    return change


def replaced(value: Any) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        module.thing = value

    return change


def also(*operations: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        for operation in operations:
            operation(module.thing)

    return change


def write_through_a_view(thing: Tensor) -> None:
    thing[..., 0] = 7.0


def make_unwriteable(thing: Any) -> None:
    thing[0] = 9.0
    thing.setflags(write=False)


def grow(thing: Any) -> None:
    thing.resize((5,), refcheck=False)
    thing[:] = 1.0


#: Value of an attribute, and what user code does to it.
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "number": (lambda: 1, replaced(2)),
    "bool": (lambda: True, replaced(False)),
    "none": (lambda: None, replaced(torch.ones(1))),
    "list appended": (lambda: [1.0], changed(lambda t: t.append(2.0))),
    "list sorted": (lambda: [3, 1, 2], changed(lambda t: t.sort())),
    "list cleared": (lambda: [torch.ones(2), {}], changed(lambda t: t.clear())),
    "list replaced": (lambda: [1.0], replaced([2.0])),
    "list of tensors written": (lambda: [torch.zeros(2)], changed(lambda t: t[0].add_(1))),
    "list subclass": (lambda: Words("ab"), changed(lambda t: t.append("c"))),
    "list subclass with attribute": (lambda: Words("ab"), changed(lambda t: setattr(t, "note", 1))),
    "nested lists": (lambda: [[[[0]]]], changed(lambda t: t[0][0][0].append(1))),
    "deque full": (lambda: deque([1, 2], maxlen=2), changed(lambda t: t.append(3))),
    "deque rotated": (lambda: deque([1, 2, 3]), changed(lambda t: t.rotate(1))),
    "dict": (lambda: {"a": 1}, changed(lambda t: t.update(a=2, b=3))),
    "dict order": (lambda: {"a": 1, "b": 2}, changed(lambda t: t.update(a=t.pop("a")))),
    "OrderedDict": (lambda: OrderedDict(a=1, b=2), changed(lambda t: t.move_to_end("a"))),
    "defaultdict": (lambda: defaultdict(list, a=[1]), also(lambda t: t["new"], lambda t: t["a"].append(2))),
    "Counter": (lambda: Counter("ab"), changed(lambda t: t.update("bc"))),
    "UserDict": (lambda: UserDict(a=1), changed(lambda t: t.update(b=2))),
    "UserList": (lambda: UserList([1]), changed(lambda t: t.append(2))),
    "set": (lambda: {1, 2}, also(lambda t: t.add(3), lambda t: t.remove(1))),
    "bytearray": (lambda: bytearray(b"ab"), changed(lambda t: t.extend(b"c"))),
    "array": (lambda: array.array("d", [1.0]), changed(lambda t: t.append(2.0))),
    "tuple of lists": (lambda: ([1], [2]), changed(lambda t: t[1].append(3))),
    "namedtuple of tensors": (lambda: Pair(torch.zeros(1), [0]), changed(lambda t: t.left.add_(1))),
    "frozenset replaced": (lambda: frozenset({1}), replaced(frozenset({2}))),
    "dataclass": (
        Running,
        also(lambda t: t.mean.add_(1), lambda t: t.seen.append(1), lambda t: setattr(t, "count", 5)),
    ),
    "frozen dataclass": (Frozen, changed(lambda t: t.inner.seen.append(1))),
    "namespace": (lambda: SimpleNamespace(a=1), also(lambda t: setattr(t, "b", 2), lambda t: delattr(t, "a"))),
    "slots": (Slotted, also(lambda t: t.value.append(2), lambda t: setattr(t, "value", None))),
    "slot named with two underscores": (Slotted, changed(lambda t: t.hide(3.0))),
    "slot that was empty": (Slotted, changed(lambda t: setattr(t, "late", 1))),
    "single slot": (OneSlot, also(lambda t: t.single.add_(1), lambda t: setattr(t, "single", 0))),
    "module in a list": (lambda: [nn.Linear(2, 2)], changed(lambda t: t[0].weight.data.zero_())),
    "module in a dict in a list": (lambda: [{"m": nn.BatchNorm1d(2)}], changed(lambda t: t[0]["m"](torch.randn(4, 2)))),
    "module switched to eval": (lambda: nn.Dropout(), changed(lambda t: t.eval())),
    "numpy written": (lambda: np.arange(3.0), changed(lambda t: t.fill(7.0))),
    "numpy with NaN": (lambda: np.array([np.nan, 1.0]), changed(lambda t: t.fill(7.0))),
    "numpy reshaped": (lambda: np.arange(6.0), changed(lambda t: setattr(t, "shape", (2, 3)))),
    "numpy resized": (lambda: np.arange(3.0), changed(grow)),
    "numpy made read-only": (lambda: np.arange(3.0), changed(make_unwriteable)),
    "numpy read-only": (lambda: np.broadcast_to(np.ones(1), (3,)), replaced(None)),
    "numpy transposed": (lambda: np.ones((2, 3)).T, changed(lambda t: t.fill(0.0))),
    "numpy Generator": (lambda: np.random.default_rng(0), changed(lambda t: t.normal(size=3))),
    "numpy RandomState": (lambda: np.random.RandomState(0), changed(lambda t: t.normal(size=3))),
    "random.Random": (lambda: random.Random(0), changed(lambda t: t.random())),
    "random.SystemRandom": (random.SystemRandom, replaced(None)),
    "torch.Generator": (lambda: torch.Generator().manual_seed(3), changed(lambda t: torch.rand(3, generator=t))),
    "tensor in place": (lambda: torch.zeros(3), changed(lambda t: t.add_(1))),
    "tensor through data": (lambda: torch.zeros(3), changed(lambda t: t.data.add_(1))),
    "tensor given other data": (lambda: torch.zeros(3), changed(lambda t: setattr(t, "data", torch.ones(5)))),
    "tensor given other type": (lambda: torch.ones(3), changed(lambda t: setattr(t, "data", t.data.view(torch.int32)))),
    "tensor halved": (lambda: torch.ones(3), changed(lambda t: setattr(t, "data", t.data.half()))),
    "tensor enlarged": (lambda: torch.ones(3), changed(lambda t: t.resize_(300).zero_())),
    "tensor shrunk": (lambda: torch.ones(3), changed(lambda t: t.resize_(1).zero_())),
    "tensor transposed in place": (lambda: torch.arange(6.0).view(2, 3), changed(lambda t: t.t_())),
    "tensor set": (lambda: torch.ones(3), changed(lambda t: t.set_(torch.zeros(2)))),
    "tensor of NaN": (lambda: torch.tensor([float("nan"), 1.0]), changed(lambda t: t.zero_())),
    "tensor of minus zero": (lambda: torch.tensor([-0.0, 1.0]), changed(lambda t: t.abs_())),
    "tensor not contiguous": (lambda: torch.ones(4, 4)[::2, 1], changed(lambda t: t.zero_())),
    "tensor expanded": (lambda: torch.ones(1).expand(3), changed(write_through_a_view)),
    "tensor of windows": (lambda: torch.ones(4).unfold(0, 2, 1), changed(write_through_a_view)),
    "tensor without axes": (lambda: torch.tensor(1.0), changed(lambda t: t.fill_(2.0))),
    "tensor without elements": (lambda: torch.zeros(0, 3), changed(lambda t: t.resize_(2, 3).zero_())),
    "tensor bfloat16": (lambda: torch.ones(3, dtype=torch.bfloat16), changed(lambda t: t.mul_(3))),
    "tensor float64": (lambda: torch.ones(3, dtype=torch.float64), changed(lambda t: t.add_(1e-12))),
    "tensor int64": (lambda: torch.arange(3), changed(lambda t: t.add_(1))),
    "tensor bool": (lambda: torch.tensor([True, False]), changed(lambda t: t.logical_not_())),
    "tensor complex64": (lambda: torch.ones(2, dtype=torch.complex64), changed(lambda t: t.mul_(1j))),
    "tensor complex128": (lambda: torch.ones(2, dtype=torch.complex128), changed(lambda t: t.mul_(1j))),
    "tensor sparse": (lambda: torch.eye(2).to_sparse(), changed(lambda t: t.mul_(2))),
    "tensor requires grad": (lambda: torch.ones(2), changed(lambda t: t.requires_grad_())),
    "tensor that joins a graph": (lambda: torch.ones(2), changed(lambda t: t.add_(torch.ones(2, requires_grad=True)))),
}


class Holder(nn.Module):
    """A module with a layer, buffers, and one further thing."""

    thing: Any

    def __init__(self, thing: Any = None) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.tied = self.layer
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)
        object.__setattr__(self, "thing", thing)  # a module among the attributes stays hidden from `modules()`


@pytest.mark.filterwarnings("ignore:Setting the shape on a NumPy array", "ignore:The given NumPy array is not writable")
@each("name", CASES)
def test_attribute_is_put_back(name: str) -> None:
    make, change = CASES[name]
    module = Holder(make())
    before = photo(module)
    snapshot = Snapshot([module])
    for _ in range(2):  # a snapshot serves several runs
        change(module)
        assert photo(module) != before
        snapshot.put_back()
        assert photo(module) == before


def test_cycles_of_objects_end() -> None:
    module = Holder()
    module.thing = SimpleNamespace(owner=module, items=[])
    module.thing.items.append(module.thing.items)
    module.thing.items.append(1)
    snapshot = Snapshot([module])
    module.thing.items.append(2)
    snapshot.put_back()
    assert module.thing.items[1:] == [1]


def test_unchanged_memory_is_not_written() -> None:
    """A tensor that kept its values keeps its version, so a graph that saved it can still be used."""
    module = Holder(torch.full((3,), float("nan")))
    versions = [tensor._version for tensor in (*module.parameters(), module.thing)]
    snapshot = Snapshot([module])
    snapshot.put_back()
    assert [tensor._version for tensor in (*module.parameters(), module.thing)] == versions


SAME = [torch.tensor(value) for value in ([1.0], [0.0], [-0.0], [float("nan")], [1], [True], [[1.0]], [1.0 + 0j], [])]


@each("left, right", itertools.product(range(len(SAME)), repeat=2))
def test_same_values_is_equality_of_bits(left: int, right: int) -> None:
    assert same_values(SAME[left], SAME[right].clone()) == (left == right)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 30, 31, 1000])
def test_few_places_are_spread_up_to_the_last_entry(size: int) -> None:
    numbers = torch.arange(2.0 * size).reshape(size, 2)
    for tensor in (numbers[:, 0].contiguous(), numbers[:, 0]):  # a view, and a copy
        places = few_places(tensor, 16).sort().values.div(2)
        assert len(places) == min(size, 16) or 8 <= len(places) <= 16
        assert places[-1:].tolist() == [size - 1] * bool(size)
        assert len(places.diff().unique()) <= 1
