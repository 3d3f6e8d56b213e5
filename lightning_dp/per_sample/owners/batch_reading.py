"""The tensors and containers of a batch or record, each with its path, whatever holds them."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_dp.per_sample._torch import memory_of, unfollowed

Path = tuple[Any, ...]
Container = tuple[Path, dict[str, Any]]

#: Types of single values, which hold nothing that is read.
SINGLE = frozenset((int, float, bool, str, bytes, type(None), type, weakref.ref))
#: Depth to which containers are read.
DEEPEST = 6
_WHOLE = (Tensor, np.ndarray, PackedSequence)
_CODE = (nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def shapes_in(thing: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the tensors in a record or batch, in a fixed order."""
    return tuple(tuple(value.shape) for _, value, _ in walk(thing) if isinstance(value, Tensor))


def read(batch: Any) -> tuple[list[tuple[Path, Any]], list[Container]]:
    """Return, with their paths, the tensors, packed sequences, lists and tuples of a batch, and as dictionaries its
    mappings, named tuples and objects with attributes.
    """
    things: list[tuple[Path, Any]] = []
    containers: list[Container] = []
    for path, thing, items in walk(batch):
        is_list = isinstance(thing, (list, tuple)) and not isinstance(thing, PackedSequence)
        if is_list or isinstance(thing, (Tensor, PackedSequence)):
            things.append((path, thing))
        if items and (not is_list or hasattr(thing, "_fields")):
            containers.append((path, {str(key): value for key, value in items}))
    return things, containers


def shown_by(array: Any) -> Tensor | None:
    """Return a tensor in the memory of an array; None if there is none, as of words."""
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError):
        return None


def alias_among(tensor: Tensor, others: Iterable[Tensor | None]) -> Tensor | None:
    """Return one of some tensors that shows the same entries in the same memory; None if there is none.

    ``torch.Tensor(x)`` and ``torch.from_numpy(x.numpy())`` give such a tensor, and report nothing.

    Example:
        >>> x = torch.rand(3)
        >>> alias_among(torch.Tensor(x), [torch.rand(3), x]) is x, alias_among(x[:2], [x]) is None
        (True, True)
    """

    def layout(one: Tensor) -> tuple[Any, ...]:
        return memory_of(one), one.storage_offset(), one.shape, one.stride(), one.dtype

    with unfollowed():
        if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel() or memory_of(tensor) == -1:
            return None
        mine = layout(tensor)
        for one in others:
            if one is not None and memory_of(one) == mine[0] and layout(one) == mine:
                return one
    return None


def walk(
    whole: Any, name: Callable[[Any, Any], Any] = lambda holder, key: key
) -> Iterator[tuple[Path, Any, list[tuple[Any, Any]]]]:
    """Yield the parts of a batch or record, each before its own parts: path, part, and its keys and values.

    Args:
        whole: the batch or record.
        name: returns the name in a path, given a container and a key of it.
    """
    waiting: list[tuple[Path, Any]] = [((), whole)]
    while waiting:
        path, part = waiting.pop()
        items = [] if isinstance(part, _WHOLE) or len(path) >= DEEPEST else [*items_of(part)]
        yield path, part, items
        inner = [(key, value) for key, value in items if type(value) not in SINGLE]
        waiting += [((*path, name(part, key)), value) for key, value in reversed(inner)]


def items_of(thing: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the key-value pairs of a container: a mapping, a sequence, a graph, or an object with attributes."""
    if isinstance(thing, Mapping) or callable(getattr(type(thing), "items", None)):  # also a tensorclass
        yield from thing.items()
    elif isinstance(thing, tuple) and hasattr(thing, "_fields"):
        yield from zip(thing._fields, thing, strict=True)
    elif isinstance(thing, (list, tuple)):
        yield from enumerate(thing)
    elif hasattr(thing, "node_types") and hasattr(thing, "to_dict"):  # as torch_geometric's HeteroData has it
        yield from thing.to_dict().items()  # asked for a key that names no type, it would make one
    elif hasattr(thing, "keys") and hasattr(thing, "__getitem__"):  # as torch_geometric's Data has it
        keys = thing.keys() if callable(thing.keys) else thing.keys
        yield from ((key, thing[key]) for key in keys)
    elif not isinstance(thing, _CODE):
        slots = (slot for kind in type(thing).__mro__ for slot in getattr(kind, "__slots__", ()))
        yield from {
            name: getattr(thing, name) for name in (*slots, *getattr(thing, "__dict__", ())) if hasattr(thing, name)
        }.items()
