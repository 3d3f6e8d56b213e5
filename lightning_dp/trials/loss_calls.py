"""The calls of torch in a forward, as ``LossForm`` compares them: also those without gradient, which no graph shows."""

from __future__ import annotations

import functools
from typing import Any

from lightning_dp.per_sample.owners.traits import SHOWS_NO_ENTRY

_NAMES_SIZES = {"view", "reshape", "expand", "repeat", "zeros", "ones", "full", "empty", "arange", "rand", "randn"}
"""Functions whose whole numbers are sizes, which may follow those of the batch."""

_SHOWS_NOTHING = {"__get__", "__set__", "clone", "detach", "tensor", "as_tensor", "squeeze", "to"}
_SHOWS_NOTHING |= {"_record_function_enter_new", "_record_function_exit"}
"""Further functions that only move tensors, or pass on what ``self.log`` is given or ``zero_grad`` sets."""

_INDEXES = {"__getitem__", "__setitem__"}
_CONTAINERS = {tuple, list, dict}


class Calls:
    """The pairs of successive calls of torch that it hears of. Each call has the small whole numbers that it is given,
    which may be dimensions, or the kinds of its indices.
    """

    def __init__(self) -> None:
        self.pairs: set[Any] = set()
        self.listens = True
        self._last: Any = None

    def hear(self, func: Any, args: Any, kwargs: Any) -> None:
        """Take note of a call."""
        if not self.listens or (name := _name_of(func)) is None:
            return
        call: Any = name
        if name in _INDEXES:
            index = args[1]
            call = (name, *map(type, index)) if type(index) is tuple else (name, type(index))
        elif name not in _NAMES_SIZES and (len(args) > 1 or kwargs):
            numbers: list[Any] = [name]
            for each in args[1:] if not kwargs else (*args[1:], *kwargs.values()):
                if type(each) is int:
                    if -4 <= each <= 4:
                        numbers.append(each)
                elif type(each) in _CONTAINERS:
                    _collect_numbers(each, numbers)
            call = tuple(numbers)
        if self._last is not None:
            self.pairs.add((self._last, call))
        self._last = call


@functools.lru_cache(4096)
def _name_of(func: Any) -> str | None:
    """Return the name of a function; None if it shows nothing."""
    if func in SHOWS_NO_ENTRY:
        return None
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    if name in _SHOWS_NOTHING:
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return name if name in ("T", "mT", "H", "mH") else None
    return name


def _collect_numbers(things: Any, found: list[Any]) -> None:
    """Add the small whole numbers in a container."""
    for each in things.values() if type(things) is dict else things:
        if type(each) is int:
            if -4 <= each <= 4:
                found.append(each)
        elif type(each) in _CONTAINERS:
            _collect_numbers(each, found)
