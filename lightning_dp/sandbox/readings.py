"""The values that user code reads from tensors in Python, by which it may choose what becomes of a whole batch."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Hashable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import frame_above, in_backward, known_to_scripts, unfollowed
from lightning_dp.system.local import is_sharded
from lightning_dp.system.torch_private import KERNELS, watch_nonzero

_FRAMEWORKS = frozenset(("torch", "lightning", "pytorch_lightning", "lightning_fabric"))
_OURS = __name__.partition(".")[0]
_MOST_ENTRIES = 4_096
"""Entries of a tensor in a list or an array up to which all its whole numbers are noted."""
_FEW_NUMBERS = 64
"""Whole numbers in lists and arrays, from 0, that differ from each other."""

Reading = tuple[Hashable, Hashable]
"""The line of code that has read a value, perhaps with what it has read, and about which value."""
Tell = Callable[[Any, Any], Iterator[tuple[tuple[Hashable, ...], Hashable]]]
"""A function that yields what there is to note, given the arguments and the result of a function of torch."""


class Readings:
    """A context that takes note of the values that user code reads from tensors within it, in its thread or a backward.

    **Guarantee**: noted is each value that ``bool``, ``int``, ``float``, an index, ``.item()`` or ``torch.equal``
    returns, with the line of user code that asks; of a tensor that becomes a list or an array, its least and largest
    value, or all whole numbers if it has few entries; of what a mask, ``nonzero``, ``unique`` or ``repeat_interleave``
    gives, the number of rows, and of a mask also that of the others. Whole numbers up to 2 (up to 63 in lists and
    arrays) differ from all others; larger ones and fractions differ by their power of two, and of 16. NOT noted: words,
    and what other threads read.
    """

    def __init__(self) -> None:
        self._found: set[Reading] = set()
        self._thread = threading.get_ident()

    def __enter__(self) -> Readings:
        if not _own:
            for owner, name, watched in _replacements():
                _own[owner, name] = vars(owner).get(name, _INHERITED)
                setattr(owner, name, watched)
            _at_end.append(watch_nonzero(_note_rows))  # a class with a ``__getitem__`` would make sequences of tensors
        _open.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _open.remove(self)

    def take(self) -> set[Reading]:
        """Return what was read since the last call."""
        found, self._found = self._found, set()
        return found

    def note(self, tell: Tell, given: Any, result: Any, frame: FrameType | None) -> None:
        """Take note of what was read in a frame, or above it, unless this package has read it.

        Args:
            tell: yields what there is to note.
            given: arguments of a function of torch.
            result: of this function.
            frame: from which this function was called.
        """
        while frame is not None and (name := _package_of(frame)) in _FRAMEWORKS:
            frame = frame.f_back
        if frame is not None and name != _OURS and (threading.get_ident() == self._thread or in_backward()):
            code = frame.f_code
            line = code.co_filename, code.co_firstlineno, frame.f_lasti
            self._found.update(((*line, *part), value) for part, value in tell(given, result))


_open: list[Readings] = []
_at_end: list[Callable[[], None]] = []
"""The functions that undo what is no attribute."""
_own: dict[tuple[Any, str], Any] = {}
"""The functions of torch that are replaced now; ``_INHERITED`` for those that a class had from another one."""
_INHERITED = object()


def note_extremes(tensor: Any) -> None:
    """Take note of the least and the largest value of a tensor that another process gave, as if the code three frames
    above had read them: no value of this batch tells what they are.
    """
    if _open and isinstance(tensor, Tensor):
        _open[-1].note(_extremes, (tensor,), None, frame_above(3))


def _note_rows(mask: Tensor, chosen: Tensor) -> None:
    """Take note of a number of rows, in the line of user code that has asked for them, perhaps by operations that this
    package sees first.
    """
    if _open:
        frame: FrameType | None = frame_above(2)
        asked = True
        while frame is not None and (name := _package_of(frame)) in (_OURS, *_FRAMEWORKS):
            asked = _hands_on(frame.f_code) if name == _OURS else asked
            frame = frame.f_back
        if asked:
            _open[-1].note(_chosen, (mask,), chosen, frame)


def _hands_on(code: CodeType) -> bool:
    """Tell whether code is a ``__torch_function__`` or ``__torch_dispatch__``, which runs operations of others."""
    return {"func", "types"} <= {*code.co_varnames[: code.co_argcount]}


def restore() -> None:
    """Give torch its own functions back at the end of a fit; each change of a class empties Python's caches of it."""
    if not _open:
        for (owner, name), function in _own.items():
            if function is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, function)
        _own.clear()
        while _at_end:
            _at_end.pop()()


def _watched(call: Callable[..., Any], name: str, tell: Tell) -> Callable[..., Any]:
    @functools.wraps(call)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        if _open:
            _open[-1].note(tell, (*args, *kwargs.values()), result, frame_above(1))
        return result

    watched.__name__ = name  # by which operations on parameters are known
    return watched


@functools.cache
def _replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return owner and name of each function that shows values, and what takes its place: always the same, because
    scripts know functions by their addresses.
    """
    made = [
        (owner, name, _watched(getattr(owner, name), name, tell))
        for owner, name, tell in _functions()
        if hasattr(owner, name)
    ]
    for owner, name, watched in made:
        known_to_scripts(watched, getattr(owner, name))
    return made


def _functions() -> Iterator[tuple[Any, str, Tell]]:
    """Yield owner and name of each function that shows values, and what to note of it."""
    for name in ("item", "__bool__", "__int__", "__float__", "__index__"):
        yield Tensor, name, _number
    for name in ("tolist", "numpy", "__dlpack__"):
        yield Tensor, name, _values
    yield torch, "_unique2", _rows  # called by ``unique``, which scripts know by its own code
    for name in ("unique_dim", "unique_consecutive"):
        yield KERNELS, name, _rows
    yield torch.nn.functional, "one_hot", _length
    for owner in (torch, Tensor):
        for name in ("equal", "allclose", "is_nonzero"):
            yield owner, name, _number
        yield owner, "masked_select", _rows
        yield owner, "repeat_interleave", _repeated
        yield owner, "bincount", _length


def _number(_: Any, result: Any) -> Iterator[tuple[tuple[Hashable, ...], Hashable]]:
    yield (), _about(result)


def _rows(_: Any, result: Any) -> Iterator[tuple[tuple[Hashable, ...], Hashable]]:
    for axis, size in enumerate((result[0] if isinstance(result, tuple) else result).shape):
        yield ("rows", axis, _about(size)), True


def _chosen(args: Any, result: Any) -> Iterator[tuple[tuple[Hashable, ...], Hashable]]:
    yield from _rows(args, result)
    yield ("others", _about(args[0].numel() - len(result))), True


def _length(_: Any, result: Any) -> Iterator[tuple[tuple[Hashable, ...], Hashable]]:
    yield ("length", _finely(result.shape[-1])), True


def _repeated(args: Any, result: Any) -> Iterator[tuple[tuple[Hashable, ...], Hashable]]:
    if len(args) == 1 or any(isinstance(each, Tensor) for each in args[1:]):  # numbers do not come from records
        yield from _rows(args, result)


def _values(args: Any, _: Any) -> Iterator[tuple[tuple[Hashable, ...], Hashable]]:
    tensor: Tensor = args[0]
    if tensor.numel() > _MOST_ENTRIES or tensor.is_floating_point() or tensor.is_complex():
        yield from _extremes(args, _)
    elif not is_sharded(tensor):
        with unfollowed():
            held = {*tensor.flatten().tolist()}
        yield from ((("holds", _finely(value)), True) for value in held)


def _extremes(args: Any, _: Any) -> Iterator[tuple[tuple[Hashable, ...], Hashable]]:
    tensor: Tensor = args[0]
    if tensor.numel() and not tensor.is_complex() and not is_sharded(tensor):
        with unfollowed():
            least, most = torch.stack(tensor.detach().aminmax()).tolist()
        yield ("least",), _about(least)
        yield ("most",), _about(most)


def _finely(value: int) -> Hashable:
    return value if 0 <= value < _FEW_NUMBERS else _about(value)


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
