"""Settings of the process that a step may change: environment variables, context variables, torch's settings."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch

from lightning_dp.sandbox.names import Names
from lightning_dp.sandbox.variables import Variables

_ABSENT = object()
_Entry = tuple[Callable[[], Any], Callable[[Any], Any]]
"""A function that reads a setting, and one that sets it."""
_DETERMINISTIC = torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode
_OF_TORCH: dict[str, _Entry] = {
    "set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "set_float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "use_deterministic_algorithms": _DETERMINISTIC,
    "set_deterministic_debug_mode": _DETERMINISTIC,
}
"""Settings of torch, by the name of the function that changes them."""
_BACKENDS = torch.backends.cudnn, torch.backends.cuda.matmul


def process_settings(names: Names, context: Iterable[ContextVar[Any]]) -> list[Variables]:
    """Return a view of the settings that user code names, in a list; an empty list if it names none.

    Args:
        names: in the user's code.
        context: variables that it names.
    """
    found: dict[str, _Entry] = {name: entry for name, entry in _OF_TORCH.items() if name in names.named}
    for number, variable in enumerate(context):
        found[f"{variable.name} {number}"] = functools.partial(_value_of, variable), variable.set
    if not names.named.isdisjoint(("environ", "putenv", "getenv")):
        found |= {f"environ {word}": (_reader_of(word), _writer_of(word)) for word in names.mentioned}
    for backend in _BACKENDS if "backends" in names.named else ():
        for name in names.attributes:
            if not callable(getattr(backend, name, len)):  # a method is no setting
                write = functools.partial(setattr, backend, name)
                found[f"{name} of {type(backend).__name__}"] = functools.partial(getattr, backend, name), write

    def read(name: str) -> Any:
        return found[name][0]()

    def write_one(name: str, value: Any) -> None:
        found[name][1](value)

    def values() -> dict[str, Any]:
        held = {name: entry[0]() for name, entry in found.items()}
        return {name: value for name, value in held.items() if value is not _ABSENT}

    def keep(name: str) -> None:  # nothing can be removed, only set
        pass

    return [Variables(values, read, write_one, keep, values)] if found else []


def _value_of(variable: ContextVar[Any]) -> Any:
    try:
        return variable.get()
    except LookupError:
        return _ABSENT


def _reader_of(word: str) -> Callable[[], Any]:
    return functools.partial(os.environ.get, word)


def _writer_of(word: str) -> Callable[[Any], None]:
    def write(value: Any) -> None:
        if value is None:
            os.environ.pop(word, None)
        else:
            os.environ[word] = value

    return write
