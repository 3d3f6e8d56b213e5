"""Values that a real batch shows for the first time: sizes of rows, and those that user code reads."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.sandbox.snapshot import few_places
from lightning_dp.system.local import local_part

if TYPE_CHECKING:
    from lightning_dp.step.step import PrivateStep

MOST = 4
"""New values at one place, after which others there are expected to come all the time."""

_FEW = 8
"""Values that are read of each tensor that functions of parameters meet."""

MOST_AT_ONCE = 16
"""Checks of new values at once; later ones once in 100 steps."""


class Firsts:
    """The values that batches have shown at certain places, and whether real ones have shown new ones.

    Example:
        >>> firsts = Firsts()
        >>> firsts.see([("line 3", False)], checked=True)
        >>> firsts.see([("line 3", False)])
        >>> firsts.is_new
        False
        >>> firsts.see([("line 3", True)])
        >>> firsts.is_new
        True
    """

    def __init__(self) -> None:
        self._known: set[tuple[Hashable, Hashable]] = set()
        self._known_at: dict[Hashable, int] = {}
        self._num_checked = self._checked_at = 0
        self.num_new = 0
        """New values that real batches have shown since ``settle``."""

    @property
    def is_new(self) -> bool:
        """True if real batches have shown a new value since ``settle``."""
        return self.num_new > 0

    def see(self, found: Iterable[tuple[Hashable, Hashable]], *, checked: bool = False) -> None:
        """Read the places and values of a batch.

        Args:
            found: places and values.
            checked: whether the batch is one of a check.
        """
        for place, value in found:
            if (place, value) in self._known:
                continue
            number = self._known_at.get(place, 0)
            if checked or number < MOST:
                self._known.add((place, value))
            if not checked and number < MOST:
                self._known_at[place] = number + 1
                self.num_new += 1

    def is_open(self, place: Hashable) -> bool:
        """Tell whether a new value at a place would count; if not, nothing needs to read it."""
        return self._known_at.get(place, 0) < MOST

    def are_due(self, number: int) -> bool:
        """Tell whether to check new values in a logical step."""
        return self.is_new and (self._num_checked < MOST_AT_ONCE or number - self._checked_at >= 100)

    def settle(self, number: int) -> None:
        """Count new values as checked in a logical step."""
        if self.is_new:
            self._num_checked, self._checked_at, self.num_new = self._num_checked + 1, number, 0


class Shown:
    """Values that batches show of their records: sizes of rows, values that user code reads, and values of tensors
    without samples that meet functions of parameters, such as the weight of a penalty, or losses of records.
    """

    def __init__(self) -> None:
        self.sizes, self.readings, self.constants = self._all = Firsts(), Firsts(), Firsts()
        self._read: tuple[list[Hashable], list[int], list[Any]] = [], [], []  # last, of constants
        self.compares = False
        """True while a batch runs whose records are compared with themselves alone."""

    @property
    def num_new(self) -> int:
        """New values of any kind that real batches have shown since ``settle``."""
        return sum(each.num_new for each in self._all)

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Run a batch, within the context, whose records are compared with themselves alone."""
        self.compares = True
        try:
            yield
        finally:
            self.compares = False

    def see(self, step: PrivateStep, *, checked: bool = False) -> None:
        """Read the values of the microbatch that runs.

        Args:
            step: runs it.
            checked: whether its records are compared with themselves alone.
        """
        if step.recording is not None:
            self.readings.see(step.recording.readings.take(), checked=checked)
            open_ones = _numbered(step.recording.constants, self.constants.is_open)
            if (read := ([*open_ones], *_few_of(open_ones.values()))) != self._read:
                self._read = read
                self.constants.see(_split(*read), checked=checked)

    def are_due(self, number: int) -> bool:
        """Tell whether to check anything new in a logical step."""
        return any(each.are_due(number) for each in self._all)

    def settle(self, number: int) -> None:
        """Count what is new as checked in a logical step."""
        for each in self._all:
            each.settle(number)


def _numbered(constants: list[tuple[Hashable, Tensor]], is_open: Callable[[Hashable], bool]) -> dict[Hashable, Tensor]:
    """Return the tensors of open places, by these: a place is a key and the number among the tensors of this key."""
    numbers: dict[Hashable, int] = {}
    found: dict[Hashable, Tensor] = {}
    for key, tensor in constants:
        numbers[key] = number = numbers.get(key, -1) + 1
        if is_open((key, number)):
            found[key, number] = tensor
    return found


def _few_of(tensors: Iterable[Tensor]) -> tuple[list[int], list[Any]]:
    """Return the numbers of values that are read of tensors, and all these values."""
    few = [few_places(local_part(tensor), _FEW).cpu() for tensor in tensors]
    if len({each.dtype for each in few}) > 1:
        few = [each.double() for each in few]  # joined, whole numbers would take the type of fractions
    values: list[Any] = torch.cat(few).tolist() if few else []
    return [*map(len, few)], values


def _split(places: list[Hashable], counts: list[int], values: list[Any]) -> Iterator[tuple[Hashable, Hashable]]:
    """Yield each place with its values, to the precision to which they are compared."""
    each = iter(values)
    for place, count in zip(places, counts, strict=True):
        yield place, tuple(f"{value:.4g}" for value in islice(each, count))
