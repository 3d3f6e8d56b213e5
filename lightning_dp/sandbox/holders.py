"""Holders: objects and containers that user code keeps values in, and what they hold at one time."""

from __future__ import annotations

import operator
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, MutableMapping, MutableSet, Sequence
from itertools import chain
from typing import Any

from lightning_dp.sandbox.object_kinds import WAYS
from lightning_dp.sandbox.refilling import (
    Stored,
    refill_mapping,
    refill_sequence,
    reset_attributes,
    same_content,
    same_value,
    stored,
)
from lightning_dp.sandbox.snapshot import NOT_PLAIN
from lightning_dp.sandbox.variables import Variables

Path = tuple[Any, ...]
"""Number of a given object, and names of attributes from there; the entries of a container have its path."""

Write = tuple[tuple[Any, ...], Any, Any]
"""Key of a write, and a value before and after: of an attribute, or a whole number that tells of a container."""

MOST_ENTRIES = 16
"""Entries of a container up to which each is looked at; of a larger one, only their number is."""
_PLAIN = frozenset((list, dict, OrderedDict, defaultdict))
_NAME_OF_HOOK = "_current_fx_name"
"""Attribute of a LightningModule that Lightning sets around each hook."""
_ABSENT = object()
_VALUES = operator.methodcaller("values")


class Holder:
    """An object or container at one time.

    Args:
        live: the attributes of an object, or a container.
        path: of it.
        is_object: whether the entries are attributes.
    """

    __slots__ = ("content", "found", "has_hook", "is_object", "live", "path", "places", "plain", "size")

    def __init__(self, live: Any, path: Path, *, is_object: bool) -> None:
        self.live, self.path, self.is_object = live, path, is_object
        self.size = _length(live)
        self.content = self._copied()
        is_view, is_known = type(live) is Variables, self.content is not None
        self.plain: Any = live if is_known and type(live) in _PLAIN else live.source if is_known and is_view else None
        """What holds the entries themselves, to be compared with the content; None if there is none."""
        self.places: Sequence[tuple[dict[str, Any], str]] = live.places if is_known and is_view else ()
        """Where the entries are, of a view of entries of dictionaries."""
        self.found: list[tuple[Path, Any]] = []
        """What is to be looked into, with its path."""
        self.has_hook = is_object and type(live) is dict and _NAME_OF_HOOK in live
        """Whether Lightning notes there which hook runs, which is of no interest."""
        if isinstance(self.content, dict) and is_object:
            named = [(name, one) for name, one in self.content.items() if WAYS[type(one)]]
            self.found = [((*path, name), one) for name, one in named if name not in NOT_PLAIN and name[:2] != "__"]
        elif self.content and not isinstance(self.content, set):
            values = self.content.values() if isinstance(self.content, dict) else self.content
            self.found = [(path, one) for one in values if WAYS[type(one)]]

    @property
    def has_names(self) -> bool:
        """True for attributes, and for plain dictionaries."""
        return isinstance(self.content, dict) and (self.plain is not None or type(self.live) is Variables)

    def _copied(self) -> Any:
        if not self.is_object and self.size > MOST_ENTRIES:
            return None
        try:
            return whole(self.live)
        except Exception:  # it cannot be read, such as a configuration that is None
            return None

    @property
    def is_swept(self) -> bool:
        """True if a ``Sweep`` can compare it."""
        return (self.plain is not None or bool(self.places)) and not self.has_hook

    def is_as_it_was(self) -> bool:
        """Tell whether the content is the same as when it was looked at."""
        if self.plain is not None:
            return same_content(self.plain, self.content)
        if self.content is None:
            return _length(self.live) == self.size
        return same_content(self.live.copy() if type(self.live) is Variables else stored(self.live), self.content)

    def renewed(self) -> Holder:
        """Return what the same object or container holds now."""
        if self.has_hook:
            self.content[_NAME_OF_HOOK] = self.live.get(_NAME_OF_HOOK)
        return self if self.is_as_it_was() else Holder(self.live, self.path, is_object=self.is_object)

    def leads_to_the_same(self, other: Holder) -> bool:
        """Tell whether the same things are to be looked into."""
        ours, others = self.found, other.found
        if ours is others:
            return True
        return len(ours) == len(others) and all(a is b for (_, a), (_, b) in zip(ours, others, strict=True))

    def writes_until(self, after: Holder) -> Iterator[Write]:
        """Yield each attribute that is another one at a later time, or a container."""
        one, other = self.content, after.content
        if one is None or other is None:
            if self.size != after.size:
                yield ("content", *self.path), self.size, after.size
        elif self.is_object:
            names = {**one, **other} if one.keys() != other.keys() else one
            for name in names:
                before, now = one.get(name, _ABSENT), other.get(name, _ABSENT)
                if not same_value(before, now) and name != _NAME_OF_HOOK:
                    yield ("attribute", *self.path, name), before, now
        elif not _same(one, other):
            count = _sum_of_counts if len(one) == len(other) else len
            yield ("content", *self.path), count(one), count(other)

    def put_back(self, content: Any) -> None:
        """Give the object or container its content back; a large container only loses what was put to its end."""
        if self.is_object:
            plain = {name: each for name, each in content.items() if name not in NOT_PLAIN}
            reset_attributes(self.live, plain, NOT_PLAIN)
        elif content is not None:
            is_sequence = isinstance(content, list)
            (refill_sequence if is_sequence else refill_mapping)(stored(self.live), content)
        else:
            for _ in range(len(self.live) - self.size):
                self.live.popitem() if isinstance(self.live, MutableMapping) else self.live.pop()


class Sweep:
    """Holders that are compared at once, which is several times as fast as one by one.

    Args:
        holders: those that take no call of Python are compared.
    """

    def __init__(self, holders: Iterable[Holder]) -> None:
        holders = [*holders]
        held = [holder for holder in holders if holder.plain is not None]
        mappings = [holder for holder in held if type(holder.plain) is not list]
        self._lives, self._mappings = [holder.plain for holder in held], [holder.plain for holder in mappings]
        self._sizes = [len(holder.content) for holder in held]
        self._entries = [*chain.from_iterable(holder.content for holder in held)]
        self._values = [*chain.from_iterable(holder.content.values() for holder in mappings)]
        self._places = [*chain.from_iterable(holder.places for holder in holders)]
        self._found = [holder.content.get(name, _ABSENT) for holder in holders for _, name in holder.places]

    def is_as_it_was(self) -> bool:
        """Tell whether the content of all of them is the same as when they were looked at."""
        return (
            [*map(len, self._lives)] == self._sizes
            and all(map(operator.is_, chain.from_iterable(self._lives), self._entries))
            and all(map(operator.is_, chain.from_iterable(map(_VALUES, self._mappings)), self._values))
            and all(map(operator.is_, [held.get(name, _ABSENT) for held, name in self._places], self._found))
        )


def _length(live: Any) -> int:
    try:
        return len(stored(live))
    except Exception:  # it cannot be read, such as a configuration that is None
        return 0


def whole(live: Any) -> Any:
    """Return a copy of all that an object or container holds now."""
    if type(live) is Variables:
        return live.copy()
    if isinstance(held := stored(live), Stored):
        return held.whole()
    kind = dict if isinstance(live, MutableMapping) else set if isinstance(live, MutableSet) else list
    return kind(live)


def _same(one: Any, other: Any) -> bool:
    """Tell whether two containers hold the same objects, or equal numbers and words."""
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return _same([*one], [*other]) and _same([*one.values()], [*other.values()])
    if isinstance(one, set):
        return bool(one == other)
    return all(map(same_value, one, other))


def _sum_of_counts(content: Any) -> int:
    return sum(value for value in (content.values() if isinstance(content, dict) else content) if type(value) is int)
