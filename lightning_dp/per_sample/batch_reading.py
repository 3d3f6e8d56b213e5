"""The tensors and containers of a batch or record, each with its path, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Path = tuple[Any, ...]
Container = tuple[Path, dict[str, Any]]

_DEEPEST = 5


def shapes_in(thing: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the tensors in a record or batch, in a fixed order."""
    return tuple(tuple(value.shape) for _, value in read(thing)[0] if isinstance(value, Tensor))


def read(batch: Any) -> tuple[list[tuple[Path, Any]], list[Container]]:
    """Return, with their paths, the tensors, packed sequences, lists and tuples of a batch, and as dictionaries its
    mappings, named tuples and objects with attributes.
    """
    things: list[tuple[Path, Any]] = []
    containers: list[Container] = []
    waiting: list[tuple[Any, Path]] = [(batch, ())]
    while waiting:
        thing, path = waiting.pop()
        if isinstance(thing, (Tensor, PackedSequence)):
            things.append((path, thing))
            continue
        is_list = isinstance(thing, (list, tuple))
        if is_list:
            things.append((path, thing))
        if len(path) >= _DEEPEST:
            continue
        items = [*items_of(thing)]
        if not is_list or hasattr(thing, "_fields"):
            containers.append((path, {str(key): value for key, value in items}))
        waiting += [(value, (*path, key)) for key, value in reversed(items)]
    return things, containers


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
    elif not isinstance(thing, (nn.Module, type)) and not callable(thing):
        slots = (slot for kind in type(thing).__mro__ for slot in getattr(kind, "__slots__", ()))
        yield from {
            name: getattr(thing, name) for name in (*slots, *getattr(thing, "__dict__", ())) if hasattr(thing, name)
        }.items()
