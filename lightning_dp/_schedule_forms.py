"""Forms of schedules, frozen and picklable, and checks of their numbers; ``schedules`` makes them.

e = t // every,   t = 0, 1, ... the logical step
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """A schedule with the same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Geometric:
    """The schedule ``factor^e``, with e = step // every."""

    factor: float
    every: int

    def __call__(self, step: int) -> float:
        return float(self.factor ** (step // self.every))


@dataclass(frozen=True)
class Exponential:
    """The schedule ``exp(-rate e / 2)``, with e = step // every."""

    rate: float
    every: int

    def __call__(self, step: int) -> float:
        return math.exp(-self.rate * (step // self.every) / 2)


@dataclass(frozen=True)
class InverseTime:
    """The schedule ``(1 + rate e)^(-1/2)``, with e = step // every."""

    rate: float
    every: int

    def __call__(self, step: int) -> float:
        return 1 / math.sqrt(1 + self.rate * (step // self.every))


@dataclass(frozen=True)
class Ramp:
    """The schedule ``1 + (final - 1) w(p)``, p = min(e every / over, 1), w(p) = p or (1 - cos(pi p)) / 2."""

    final: float
    over: int
    every: int
    cosine: bool

    def __call__(self, step: int) -> float:
        done = min(step // self.every * self.every / self.over, 1.0)
        weight = (1 - math.cos(math.pi * done)) / 2 if self.cosine else done
        return (1 - weight) + self.final * weight


@dataclass(frozen=True)
class Intervals:
    """A schedule given by a function of the index of the interval, e = step // every."""

    function: Callable[[int], float]
    every: int

    def __call__(self, step: int) -> float:
        return float(self.function(step // self.every))


def interval(name: str, value: int | None) -> int:
    """Return a number of steps, checked to be whole and >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected an integer number of steps {name} >= 1, got {name}={value}. Pass an int.")
    return value


def exactly_one(**given: float | None) -> None:
    """Check that exactly one of some arguments is given."""
    if sum(value is not None for value in given.values()) != 1:
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"Expected exactly one of {' and '.join(given)}, got {shown}. Pass one.")
