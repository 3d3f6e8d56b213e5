"""Functions that give containers, objects and classes the content back that they had in a snapshot."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

from lightning_dp.sandbox.object_kinds import state_of_class

ABSENT = object()
"""Value of an attribute that is missing."""
_PLAIN = (int, float, complex, str)
Value = tuple[Any, str, Any]
"""Attributes or variables, the name of one of them, and its value at some time, or ``ABSENT``."""
_READING = ("__getitem__", "__iter__", "__len__", "items", "keys", "values")


def reset_attributes(attributes: dict[str, Any], before: dict[str, Any], skipped: frozenset[str]) -> None:
    """Reset the attributes of an object, except those with names in ``skipped``."""
    for name in [name for name in attributes if name not in before and name not in skipped]:
        del attributes[name]
    for name, value in before.items():
        if attributes.get(name, ABSENT) is not value:
            attributes[name] = value


def same_value(one: Any, other: Any) -> bool:
    """Tell whether two values are the same object, or equal numbers or words."""
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other))


def changed(held: list[tuple[Any, Any]]) -> dict[tuple[Any, ...], Value]:
    """Return by a key the values that have changed since then."""
    found: dict[tuple[Any, ...], Value] = {}
    for number, (attributes, before) in enumerate(held):
        now = attributes.copy()
        for name in () if same_content(now, before) else {*now, *before}:
            one, other = before.get(name, ABSENT), now.get(name, ABSENT)
            if not same_value(one, other):
                found["read", number, name] = attributes, name, one
    return found


def put_back(values: Iterable[Value]) -> None:
    """Give attributes and variables some values back."""
    for attributes, name, value in values:
        if value is not ABSENT:
            attributes[name] = value
        else:
            attributes.pop(name, None)


def same_content(holder: Any, content: Any) -> bool:
    """Tell whether the content of a container is unchanged."""
    if len(holder) != len(content):
        return False
    if isinstance(content, dict):
        return all(map(operator.is_, holder.values(), content.values())) and all(map(operator.is_, holder, content))
    if isinstance(content, set):
        return all(item in content for item in holder)
    return all(map(operator.is_, holder, content))


class Stored:
    """The content that a dictionary stores, whatever its class computes in place of it; for :func:`refill_mapping`.

    The mappings of transformers would import all its models, or make layers of their classes, if they were asked.

    Args:
        held: the dictionary.
    """

    def __init__(self, held: dict[Any, Any]) -> None:
        self._held, self._kind = held, OrderedDict if isinstance(held, OrderedDict) else dict

    @staticmethod
    def differs(holder: Any) -> bool:
        """Tell whether the class of a dictionary has methods of its own to read it."""
        kind, base = type(holder), OrderedDict if isinstance(holder, OrderedDict) else dict
        return any(getattr(kind, name) is not getattr(base, name) for name in _READING)

    def __len__(self) -> int:
        return dict.__len__(self._held)

    def __iter__(self) -> Iterator[Any]:
        return self._kind.__iter__(self._held)

    def values(self) -> list[Any]:
        """Return the values in the order of the keys."""
        return [dict.__getitem__(self._held, key) for key in self]

    def whole(self) -> dict[Any, Any]:
        """Return all entries."""
        return dict(zip(self, self.values(), strict=True))

    def clear(self) -> None:
        """Remove all entries."""
        self._kind.clear(self._held)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._kind.__setitem__(self._held, key, value)


def stored(holder: Any) -> Any:
    """Return a container, or the content that it stores if it is a dictionary whose class computes another."""
    return Stored(holder) if isinstance(holder, dict) and Stored.differs(holder) else holder


def refill_mapping(holder: Any, content: Any) -> None:
    """Give a mapping or a set its content."""
    holder.clear()
    if isinstance(content, dict):
        for key, value in content.items():
            holder[key] = value
    else:
        for item in content:
            holder.add(item)


def refill_sequence(holder: Any, content: list[Any]) -> None:
    """Give a list or a queue its content."""
    if hasattr(holder, "clear"):
        holder.clear()
    else:  # array.array before Python 3.13
        del holder[:]
    holder.extend(content)


def reset_class(kind: type[Any], before: dict[str, Any]) -> None:
    """Reset the attributes of a class that are state; methods are not touched."""
    now = state_of_class(kind)
    for name in now.keys() - before.keys():
        delattr(kind, name)
    for name, value in before.items():
        if now.get(name, ABSENT) is not value:
            setattr(kind, name, value)


def plain_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and words among attributes."""
    return {name: value for name, value in attributes.items() if value is None or isinstance(value, (int, float, str))}


def replace_plain(
    attributes: MutableMapping[str, Any], values: dict[str, Any], names: Collection[str]
) -> Callable[[], None]:
    """Set numbers and words among attributes; those that held something else before, by their names, stay.

    Returns:
        A function that undoes it, also where a value took the place of something else.
    """
    replaced = {name: attributes[name] for name in values if name in attributes}
    undo = partial(_set_plain, attributes, {**plain_of(attributes), **replaced}, {*attributes})
    _set_plain(attributes, values, names)
    return undo


def _set_plain(attributes: MutableMapping[str, Any], values: dict[str, Any], names: Collection[str]) -> None:
    held = plain_of(attributes)
    for name in held.keys() - names:
        del attributes[name]
    for name, value in values.items():
        if name not in held or held[name] is not value:
            attributes[name] = value
