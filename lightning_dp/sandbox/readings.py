"""The values that user code reads from tensors in Python, by which it may choose what becomes of a whole batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import frame_above, in_backward

_READERS = ("item", "__bool__", "__int__", "__float__", "__index__")
_FRAMEWORKS = frozenset(("torch", "lightning", "pytorch_lightning", "lightning_fabric"))
_OURS = __name__.partition(".")[0]

Reading = tuple[Hashable, Hashable]
"""The line of code that has read a value, and about which value."""


class Readings:
    """A context that takes note of the values that user code reads from tensors within it, in its thread or a backward.

    **Guarantee**: each value that ``bool``, ``int``, ``float``, an index or ``.item()`` returns is noted, with the line
    of user code that asks. Whole numbers up to 2 differ from all others; larger ones and fractions differ by their
    power of two, and of 16. NOT noted: values in lists and arrays, and shapes that follow values.
    """

    def __init__(self) -> None:
        self._found: set[Reading] = set()
        self._thread = threading.get_ident()

    def __enter__(self) -> Readings:
        if _READERS[0] not in vars(Tensor):
            for name, reader in _WATCHED.items():
                setattr(Tensor, name, reader)
        _open.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _open.remove(self)

    def take(self) -> set[Reading]:
        """Return what was read since the last call."""
        found, self._found = self._found, set()
        return found

    def note(self, value: Any, above: int = 2) -> None:
        """Take note of a value that was read so many frames above, unless it was read by this package."""
        frame: FrameType | None = frame_above(above)
        while frame is not None and (name := _package_of(frame)) in _FRAMEWORKS:
            frame = frame.f_back
        if frame is not None and name != _OURS and (threading.get_ident() == self._thread or in_backward()):
            code = frame.f_code
            self._found.add(((code.co_filename, code.co_firstlineno, frame.f_lasti), _about(value)))


_open: list[Readings] = []


def note_extremes(tensor: Any) -> None:
    """Take note of the least and the largest value of a tensor that another process gave, as if the code three frames
    above had read them: no value of this batch tells what they are.
    """
    if _open and isinstance(tensor, Tensor) and tensor.numel() and not tensor.is_complex():
        for value in torch.stack(tensor.detach().aminmax()).tolist():
            _open[-1].note(value, above=4)


def restore() -> None:
    """Give tensors their own methods back at the end of a fit; each change of a class empties Python's caches of it."""
    if not _open and _READERS[0] in vars(Tensor):
        for name in _WATCHED:
            delattr(Tensor, name)


def _watched(read: Callable[[Tensor], Any], name: str) -> Callable[[Tensor], Any]:
    def watched(self: Tensor) -> Any:
        value = read(self)
        if _open:
            _open[-1].note(value)
        return value

    watched.__name__ = name  # by which operations on parameters are known
    return watched


_WATCHED = {name: _watched(getattr(Tensor, name), name) for name in _READERS}


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _about(value: Any) -> Hashable:
    """Return a number to the precision to which readings are compared."""
    if isinstance(value, complex) or not math.isfinite(value):
        return str(value) if not isinstance(value, complex) else "complex"
    if whole := value == int(value):
        value = int(value)
        return value if abs(value) <= 2 else (whole, value > 0, value.bit_length())
    return whole, value > 0, math.frexp(value)[1] // 4
