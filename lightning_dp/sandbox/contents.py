"""Contents of what user code keeps, and changes in place: attributes of objects, containers, arrays, small tensors."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dp.per_sample._torch import dense_parts_of, is_sparse, unfollowed
from lightning_dp.sandbox.holders import Holder, Path, Sweep, Write, whole
from lightning_dp.sandbox.kept_tensors import same_values
from lightning_dp.sandbox.object_kinds import WAYS, entries_of, own_classes, slots_of
from lightning_dp.sandbox.variables import Variables
from lightning_dp.system.torch_private import changes_of, num_changes

_MOST_VALUES = 1_000
"""Values of a tensor or array up to which they are kept."""
_MOST_ENTRIES = 8
"""Entries of a container up to which another one in its place is compared with it."""
_MOST_HOLDERS = 128
"""Objects and containers that are looked into, beyond those that are given."""


class Contents:
    """The contents of objects, and of all that these hold, at one time.

    Looked into are the user's own objects, containers of any class, numpy arrays and tensors, however deep, up to 128
    objects and containers. Of a class, its attributes are looked at too.

    Args:
        given: attributes of objects.
        buffers: of the module.
        counts: numbers of changes of the buffers.
        last: contents at an earlier time; what is unchanged is taken over from them.
    """

    def __init__(
        self, given: Sequence[Any], buffers: list[Tensor], counts: Sequence[int], last: Contents | None = None
    ) -> None:
        self.roots, self._last = [*given], last
        self.holders: dict[int, Holder] = {}
        self.owners: list[Any] = []
        self.attributes: list[dict[str, Any]] = []  # of the owners
        self.views: dict[int, tuple[Any, Variables]] = {}
        self.arrays: dict[int, tuple[Any, Path, Any]] = {}
        self.tensors: dict[int, tuple[Tensor, Path]] = {}
        self.restless: set[int]
        """Holders that have changed before, or take a call of Python: they are compared one by one."""
        self.quiet: Sweep
        """The others, which are compared at once."""
        if last is None or not self._takes_over(last):
            self._walk()
            restless = set() if last is None else last.restless & self.holders.keys()
            self.restless = restless | {key for key, one in self.holders.items() if not one.is_swept}
            self.quiet = Sweep(holder for key, holder in self.holders.items() if key not in self.restless)
        self.given: list[dict[str, Any]] = [self.holders[id(each)].content for each in given]
        """Copies of the attributes that were given."""
        tensors = [*buffers, *(one for one, _ in self.tensors.values())]
        with unfollowed():
            counts = [*counts, *changes_of(tensors[len(buffers) :])]
        known = {} if last is None else last.values
        self.values: dict[int, tuple[Tensor, int, Tensor | None]] = {}
        for one, count in zip(tensors, counts, strict=True):
            kept = known.get(id(one))
            if kept is None or kept[0] is not one or kept[1] != count:
                kept = one, count, _values_of(one)
            self.values[id(one)] = kept
        self._last = None

    def _takes_over(self, last: Contents) -> bool:
        """Look only at what was looked at before, if that leads to nothing else; tell whether it does."""
        if len(self.roots) != len(last.roots) or not all(map(operator.is_, self.roots, last.roots)):
            return False
        if not all(map(operator.is_, map(vars, last.owners), last.attributes)):
            return False
        self.restless, self.quiet = last.restless, last.quiet
        if not self.quiet.is_as_it_was():
            changed = {key for key, was in last.holders.items() if key not in last.restless and not was.is_as_it_was()}
            self.restless = last.restless | changed
            self.quiet = Sweep(was for key, was in last.holders.items() if key not in self.restless)
        holders = last.holders.copy()
        for key in self.restless:
            was = last.holders[key]
            holders[key] = now = was.renewed()
            if now is not was and not now.leads_to_the_same(was):
                return False
        self.holders = holders
        self.owners, self.attributes, self.views, self.tensors = last.owners, last.attributes, last.views, last.tensors
        self.arrays = {key: _array_of(*each) for key, each in last.arrays.items()}
        return True

    def _walk(self) -> None:
        self._waiting: list[tuple[Any, Path, bool]] = [(each, (index,), True) for index, each in enumerate(self.roots)]
        known = {} if self._last is None else self._last.holders
        for at, (live, path, is_object) in enumerate(self._waiting):  # grows
            if id(live) in self.holders or at >= len(self.roots) + _MOST_HOLDERS:
                continue
            before = known.get(id(live))
            is_known = before is not None and before.live is live
            holder = before.renewed() if is_known and before is not None else Holder(live, path, is_object=is_object)
            self.holders[id(live)] = holder
            for place, one in holder.found:
                self._enter(one, place)
        del self._waiting

    def _enter(self, one: Any, path: Path) -> None:
        """Note something that is to be looked into."""
        way = WAYS[type(one)]
        if way == "tensor":
            self.tensors.setdefault(id(one), (one, path))
        elif way == "array":
            if one.size <= _MOST_VALUES:
                self.arrays[id(one)] = one, path, one.copy()
        elif way in ("fixed", "bound"):
            for each in entries_of(one):
                if WAYS[type(each)]:
                    self._enter(each, path)
        else:
            if way == "container":
                self._waiting.append((one, path, False))
            self._enter_object(one, path)

    def _enter_object(self, one: Any, path: Path) -> None:
        kind: Any = type(one)
        is_own = WAYS[kind] == "own" or own_classes(kind)  # those of Python's containers hold nothing
        if is_own and kind.__dictoffset__ and isinstance(attributes := getattr(one, "__dict__", None), dict):
            self.owners.append(one)
            self.attributes.append(attributes)
            self._waiting.append((attributes, path, True))
        if slots_of(kind):
            self._waiting.append((self._view(one, Variables.of_slots), path, True))
        for each in own_classes(kind):
            self._waiting.append((self._view(each, Variables.of_class), (each.__qualname__,), True))

    def _view(self, owner: Any, make: Callable[[Any], Variables]) -> Variables:
        """Return a view of slots or of a class; the same one as in the contents before."""
        last = (self.views if self._last is None else self._last.views).get(id(owner))
        view = make(owner) if last is None or last[0] is not owner else last[1]
        return self.views.setdefault(id(owner), (owner, view))[1]

    def writes_until(self, after: Contents) -> Iterator[Write]:
        """Yield each attribute and container whose content is another one at a later time, and objects that are new."""
        for index, each in enumerate(after.roots):
            if id(each) not in self.holders:
                yield ("object", index), None, None
        for key, holder in self.holders.items():
            later = after.holders.get(key)
            if later is not None and later is not holder and later.live is holder.live:
                for place, before, now in holder.writes_until(later):
                    yield place, self.number_of(before), after.number_of(now)
        for key, (array, path, values) in self.arrays.items():
            if (also := after.arrays.get(key)) is not None and also[0] is array and not _same_array(values, also[2]):
                yield ("content", *path), None, None
        for key, (one, path) in self.tensors.items():
            if key in after.tensors and after.tensors[key][0] is one:
                (_, count, before), (_, now, newer) = self.values[key], after.values[key]
                if count != now and before is not None and newer is not None and not same_values(before, newer):
                    # a trial puts values back, which counts as a change
                    yield ("content", *path), _count_of(before), _count_of(newer)

    def number_of(self, value: Any) -> Any:
        """Return what a value is compared by with others in its place: the whole number in a tensor or array of one, a
        word for a small container of whole numbers and words, None for other ones.
        """
        if type(value) in (list, tuple, dict):
            held = [self._single(one) for one in entries_of(value)] if len(value) <= _MOST_ENTRIES else [None]
            return None if None in held else str(held)
        return self._single(value)

    def _single(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.count_in(value)
        if isinstance(value, (np.ndarray, np.generic)):
            return _whole_number(value.item()) if value.size == 1 and value.dtype.kind in "biuf" else None
        return value if isinstance(value, (int, str)) else None

    def count_in(self, tensor: Tensor) -> int | None:
        """Return the whole number that a buffer, or another tensor that was looked at, held alone."""
        _, _, values = self.values.get(id(tensor), (tensor, 0, None))
        return None if values is None else _count_of(values)

    @contextmanager
    def back_in(self) -> Iterator[None]:
        """Give containers, arrays, tensors, and objects that were not given, their contents back within the context. A
        large container only loses what was put to its end, and a large tensor keeps its values.
        """
        with torch.no_grad(), unfollowed():
            further = [*self.holders.values()][len({*map(id, self.roots)}) :]
            held = [each for each in further if not each.is_as_it_was()]
            now: list[Callable[[], Any]] = [functools.partial(each.put_back, whole(each.live)) for each in held]
            for each in held:
                each.put_back(each.content)
            for one, before in self._changed_values():
                now.append(functools.partial(_fill, one, one.copy() if isinstance(one, np.ndarray) else one.clone()))
                _fill(one, before)
        try:
            yield
        finally:
            with torch.no_grad(), unfollowed():
                for put_back in now:
                    put_back()

    def _changed_values(self) -> Iterator[tuple[Any, Any]]:
        for one, count, values in self.values.values():
            if values is not None and num_changes(one) != count:
                yield one, values
        for array, _, held in self.arrays.values():
            if not _same_array(held, array):
                yield array, held


def _array_of(array: Any, path: Path, held: Any) -> tuple[Any, Path, Any]:
    return array, path, held if _same_array(held, array) else array.copy()


def _values_of(tensor: Tensor) -> Tensor | None:
    """Return a copy of a small tensor without a gradient."""
    with torch.no_grad(), unfollowed():
        is_known = tensor.layout == torch.strided or is_sparse(tensor)
        small = is_known and dense_parts_of(tensor)[-1].numel() <= _MOST_VALUES and not tensor.requires_grad
        return tensor.detach().clone() if small else None


def _count_of(values: Tensor) -> int | None:
    """Return the whole number in a tensor of one."""
    if values.numel() != 1 or values.is_complex() or values.layout != torch.strided:
        return None
    return _whole_number(float(values))


def _whole_number(value: float) -> int | None:
    return int(value) if float(value).is_integer() else None


def _fill(one: Any, content: Any) -> None:
    if one.shape == content.shape:
        if isinstance(one, Tensor):
            one.copy_(content)
        else:
            one[...] = content


def _same_array(one: Any, other: Any) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool(one.tobytes() == other.tobytes())
