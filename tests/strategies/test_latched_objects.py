"""Objects in which a step keeps something, once certain records come: attributes, containers, arrays, named classes."""

from __future__ import annotations

import functools
import sys
import types
from collections import Counter
from typing import Any

import numpy as np
import pytest
from torch import nn

from lightning_dp import PrivacyError
from tests.strategies.test_latched_state import REFUSED, STEPS, steps_of_fit
from tests.strategies.test_latched_variables import Latches

SETTINGS = types.ModuleType("settings_of_a_test")
SETTINGS.__dict__["factor"] = 1.0
OPTIONS = types.SimpleNamespace(factor=1.0)
TABLE = np.ones(2)


class Thing:
    def __init__(self) -> None:
        self.factor = 1.0


class Slotted:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0


THING = Thing()


class Named:
    factor = 1.0


class Layer(nn.Module):
    factor = 1.0


def scaled(loss: float) -> float:
    return loss


scaled.__dict__["factor"] = 1.0


def remembered(more: float = 0.0, kept: list[float] = []) -> float:  # noqa: B006
    kept += [more] if more else []
    return kept[-1] if kept else 1.0


def of_module(make: Any, read: Any, write: Any) -> type[Latches]:
    class OfModule(Latches):
        def __init__(self, *, by_count: bool) -> None:
            super().__init__(by_count=by_count)
            self.held = make()

        def read(self) -> float:
            return float(read(self.held))

        def write(self) -> None:
            write(self.held)

    return OfModule


def halve(thing: Any) -> None:
    thing.factor = 0.5


class OfGlobal(Latches):
    def read(self) -> float:
        return THING.factor

    def write(self) -> None:
        THING.factor = 0.5


class OfNamespace(Latches):
    def read(self) -> float:
        return float(OPTIONS.factor)

    def write(self) -> None:
        OPTIONS.factor = 0.5


class OfArray(Latches):
    def read(self) -> float:
        return float(TABLE[1])

    def write(self) -> None:
        TABLE[1] = 0.5


class OfNamedClass(Latches):
    def read(self) -> float:
        return Named.factor

    def write(self) -> None:
        Named.factor = 0.5


class OfFunction(Latches):
    def read(self) -> float:
        return float(scaled.factor)  # type: ignore[attr-defined]

    def write(self) -> None:
        scaled.factor = 0.5  # type: ignore[attr-defined]


class OfDefault(Latches):
    def read(self) -> float:
        return remembered()

    def write(self) -> None:
        remembered(0.5)


class OfOtherModule(Latches):
    def read(self) -> float:
        return float(SETTINGS.factor)

    def write(self) -> None:
        setattr(SETTINGS, "factor", 0.5)  # noqa: B010


def by_factor(thing: Any) -> Any:
    return thing.factor


PLACES: dict[str, type[Latches]] = {
    "object": of_module(Thing, by_factor, halve),
    "slots": of_module(Slotted, by_factor, halve),
    "deep": of_module(lambda: {"a": [Thing()]}, lambda held: held["a"][0].factor, lambda held: halve(held["a"][0])),
    "set": of_module(set, lambda held: 0.5 if held else 1.0, lambda held: held.add(1)),
    "counter": of_module(Counter, lambda held: 0.5 if held else 1.0, lambda held: held.update("a")),
    "array": of_module(lambda: np.ones(2), lambda held: held[0], lambda held: held.__setitem__(0, 0.5)),
    "tuple": of_module(lambda: ([1.0],), lambda held: held[0][-1], lambda held: held[0].append(0.5)),
    "bound method": of_module(lambda: [1.0].append, lambda put: put.__self__[-1], lambda put: put(0.5)),
    "partial function": of_module(
        lambda: functools.partial(dict, factor=1.0),
        lambda held: held()["factor"],
        lambda held: held.keywords.update(factor=0.5),
    ),
    "class of a layer": of_module(Layer, by_factor, lambda held: halve(type(held))),
    "global object": OfGlobal,
    "global namespace": OfNamespace,
    "global array": OfArray,
    "named class": OfNamedClass,
    "attribute of a function": OfFunction,
    "default of an argument": OfDefault,
    "attribute of a Python module": OfOtherModule,
}


@pytest.fixture(autouse=True)
def _reset() -> Any:
    SETTINGS.__dict__["factor"] = OPTIONS.factor = THING.factor = Named.factor = Layer.factor = scaled.__dict__[
        "factor"
    ] = 1.0
    TABLE[:] = 1.0
    kept: Any = remembered.__defaults__
    kept[1].clear()
    sys.modules.setdefault(SETTINGS.__name__, SETTINGS)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.one_in(8)
def test_what_a_rare_record_puts_there_is_refused(name: str, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        steps_of_fit(tmp_path, PLACES[name](by_count=False))


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.one_in(14)
def test_what_counts_put_there_is_free(name: str, tmp_path: Any) -> None:
    module = PLACES[name](by_count=True)
    assert steps_of_fit(tmp_path, module) == STEPS
    assert module.read() == 0.5


class OpenToAll:
    """Has every attribute that it is asked for, as mocks and some configurations do."""

    def __getattr__(self, name: str) -> Any:
        return None


def test_objects_with_any_attribute_are_followed(tmp_path: Any) -> None:
    assert steps_of_fit(tmp_path, of_module(OpenToAll, lambda held: 1.0, halve)(by_count=True), steps=12) == 12
