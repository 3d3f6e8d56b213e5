"""Variables that a step sets once, when certain records come: those of Python modules, functions and classes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from lightning_dp import PrivacyError
from tests.strategies.test_latched_state import RARE, REFUSED, STEPS, Module, steps_of_fit

FACTOR = 1.0
OPTIONS: dict[str, float] = {}
SEEN: list[int] = []


class Latches(Module):
    """Sets a variable at a rare word, or at the fifth run."""

    factor_of_class = 1.0

    def __init__(self, *, by_count: bool) -> None:
        super().__init__()
        self.by_count = by_count

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) * self.read()
        if self.num == 5 if self.by_count else (batch[0] == RARE).any():
            self.write()
        return loss

    def read(self) -> float:
        raise NotImplementedError

    def write(self) -> None:
        raise NotImplementedError


class GlobalNumber(Latches):
    def read(self) -> float:
        return FACTOR

    def write(self) -> None:
        global FACTOR
        FACTOR = 0.5


def _latch() -> None:
    OPTIONS["seen"] = 0.5


class GlobalOptions(Latches):
    def read(self) -> float:
        return OPTIONS.get("seen", 1.0)

    def write(self) -> None:
        _latch()


class GlobalList(Latches):
    def read(self) -> float:
        return 0.5 if SEEN else 1.0

    def write(self) -> None:
        SEEN.append(1)


class OfItsClass(Latches):
    def read(self) -> float:
        return self.factor_of_class

    def write(self) -> None:
        type(self).factor_of_class = 0.5


class OfABase(Latches):
    def read(self) -> float:
        return self.factor_of_class

    def write(self) -> None:
        Latches.factor_of_class = 0.5


def enclosed(**options: Any) -> Any:
    factor = 1.0

    class Enclosed(Latches):
        def read(self) -> float:
            return factor

        def write(self) -> None:
            nonlocal factor
            factor = 0.5

    return Enclosed(**options)


def enclosed_options(**options: Any) -> Any:
    kept: dict[str, float] = {}

    class Enclosed(Latches):
        def read(self) -> float:
            return kept.get("seen", 1.0)

        def write(self) -> None:
            kept["seen"] = 0.5

    return Enclosed(**options)


VARIABLES = [GlobalNumber, GlobalOptions, GlobalList, OfItsClass, OfABase, enclosed, enclosed_options]


@pytest.fixture(autouse=True)
def _reset() -> Any:
    global FACTOR
    FACTOR, Latches.factor_of_class, OfItsClass.factor_of_class = 1.0, 1.0, 1.0
    OPTIONS.clear(), SEEN.clear()


@pytest.mark.parametrize("make", VARIABLES)
@pytest.mark.one_in(5)
def test_a_variable_that_a_rare_record_sets_is_refused(make: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        steps_of_fit(tmp_path, make(by_count=False))


@pytest.mark.parametrize("make", VARIABLES)
@pytest.mark.one_in(8)
def test_a_variable_that_is_set_by_counts_is_free(make: Any, tmp_path: Any) -> None:
    module = make(by_count=True)
    assert steps_of_fit(tmp_path, module) == STEPS
    assert module.read() == 0.5


CALLS = 0


class Counts(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        global CALLS
        CALLS += 1
        SEEN.append(CALLS)
        return super().training_step(batch, batch_idx) / CALLS


def test_globals_hold_real_steps_alone(tmp_path: Any) -> None:
    assert steps_of_fit(tmp_path, Counts(), steps=12) == 12
    assert [*range(1, 13)] == SEEN
