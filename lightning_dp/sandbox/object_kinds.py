"""Kinds of objects, by their class: how a snapshot follows them."""

from __future__ import annotations

import argparse
import enum
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Mapping, MutableMapping, MutableSequence, MutableSet
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

#: Types whose values cannot change.
_CONSTANT = (
    bool, int, float, complex, str, bytes, type(None), type, range, torch.dtype, torch.device, torch.Size,
    types.ModuleType, types.FunctionType, Dataset, DataLoader,
)  # fmt: skip
#: Types whose values lead to others, and hold nothing else.
_BOUND: tuple[Any, ...] = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType, functools.partial)
#: Packages whose objects are not followed: they are no state of the user's, or lead to everything else.
_FOREIGN = (
    "lightning.", "pytorch_lightning.", "lightning_dp.", "torch.distributed", "logging", "threading", "_thread",
    "weakref", "_io",
)  # fmt: skip
#: Packages whose classes hold no state of the user's.
NOT_OWN = sys.stdlib_module_names | {
    "torch",
    "torchmetrics",
    "numpy",
    "lightning",
    "pytorch_lightning",
    "lightning_dp",
}
#: Classes of random generators.
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
_CONTAINERS = (MutableMapping, MutableSequence, deque, MutableSet)
_KINDS: dict[str, Any] = {
    "constant": _CONSTANT, "bound": _BOUND, "tensor": Tensor, "array": np.ndarray, "generator": GENERATORS,
    "container": _CONTAINERS, "fixed": (tuple, frozenset), "module": nn.Module,
}  # fmt: skip


@functools.lru_cache(4096)
def kind_of(kind: Any) -> str:
    """Return how the objects of a class are followed."""
    found = next((name for name, kinds in _KINDS.items() if issubclass(kind, kinds)), "own")
    foreign = found == "own" and any(each.__module__.startswith(_FOREIGN) for each in kind.__mro__)
    return "foreign" if foreign else found


class _Ways(dict[type, str]):
    """A table of how objects of a class are looked into, as ``kind_of`` names it; "" for those that hold nothing."""

    def __missing__(self, kind: type) -> str:
        way = kind_of(kind)
        holds = way in ("bound", "tensor", "array", "container", "fixed") or (way == "own" and _is_of_user(kind))
        self[kind] = found = way if holds else ""
        return found


def _is_of_user(kind: Any) -> bool:
    """Tell whether objects of a class hold state of the user's: no descriptors, members of an enumeration, nor what
    Python and torch define.
    """
    known = own_classes(kind) or issubclass(kind, (types.SimpleNamespace, argparse.Namespace))
    holds = bool(kind.__dictoffset__ or slots_of(kind))
    return bool(known and holds and not hasattr(kind, "__get__") and not issubclass(kind, enum.Enum))


WAYS = _Ways()


@functools.lru_cache(4096)
def slots_of(kind: Any) -> list[str]:
    """Return the names of all slots of a class, private ones as Python mangles them."""
    found: list[str] = []
    for each in kind.__mro__:
        own = vars(each).get("__slots__", ())
        for name in [own] if isinstance(own, str) else own:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{each.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


@functools.lru_cache(4096)
def own_classes(kind: Any) -> list[type[Any]]:
    """Return a class and its bases, but for those of Python, torch, Lightning and this package."""
    bases = [each for each in kind.__mro__ if each.__module__.partition(".")[0] not in NOT_OWN]
    return [each for each in bases if not isinstance(each, enum.EnumMeta)]


def state_of_class(kind: type[Any]) -> dict[str, Any]:
    """Return the attributes of a class that are values: neither methods nor properties, nor Python's own."""
    held = vars(kind).items()
    return {name: value for name, value in held if name[:2] != "__" and not hasattr(type(value), "__get__")}


def entries_of(container: Any) -> list[Any]:
    """Return the values of a mapping, or what another container holds; nothing if it cannot be read, such as a
    configuration that is None. A method that is bound leads to its owner, a partial function to what it is given.
    """
    if isinstance(container, tuple):  # a subclass may refuse to be counted
        return [*tuple.__iter__(container)]
    if isinstance(container, functools.partial):
        return [container.func, *container.args, container.keywords]
    if isinstance(container, _BOUND):
        return [container.__self__]
    try:
        return [*(container.values() if isinstance(container, Mapping) else container)]
    except Exception:
        return []
