"""Contents of containers and tensors that user code keeps, and changes in place."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.step.refilling import refill_mapping, refill_sequence
from lightning_dp.step.snapshot import NOT_PLAIN
from lightning_dp.system.torch_private import changes_of, num_changes

_MOST_ENTRIES = 16
"""Entries of a container up to which each is looked at; of a larger one, only their number is."""
_MOST_VALUES = 1_000
"""Values of a tensor up to which they are kept."""
_WATCHED = frozenset((list, dict, deque, Tensor))


class Contents:
    """The contents of containers and tensors at one time.

    Args:
        held: attributes of objects, as they are now.
        buffers: of the module.
        counts: numbers of changes of the buffers.
        last: contents at an earlier time, whose copies of tensors are taken over if these are unchanged.
    """

    def __init__(
        self, held: list[dict[str, Any]], buffers: list[Tensor], counts: Sequence[int], last: Contents | None = None
    ) -> None:
        found = [
            (index, name, one)
            for index, each in enumerate(held)
            for name, one in each.items()
            if type(one) in _WATCHED and name not in NOT_PLAIN
        ]
        self.found = [each for each in found if type(each[2]) is not Tensor]
        containers = [each[2] for each in self.found]
        self.sizes = [*map(len, containers)]
        self.copies = [
            one.copy() if size <= _MOST_ENTRIES else None for one, size in zip(containers, self.sizes, strict=True)
        ]
        parts = [[*one, *one.values()] if type(one) is dict else one for one in self.copies if one]
        self.entries = [*chain.from_iterable(parts)]  # of all of them
        self.named = {each[:2]: each[2] for each in found if type(each[2]) is Tensor}
        tensors = [*buffers, *self.named.values()]
        with unfollowed():
            counts = [*counts, *changes_of(tensors[len(buffers) :])]
        known = {} if last is None else last.values
        self.values: dict[int, tuple[Tensor, int, Tensor | None]] = {}
        for one, count in zip(tensors, counts, strict=True):
            kept = known.get(id(one))
            if kept is None or kept[0] is not one or kept[1] != count:
                kept = one, count, _values_of(one)
            self.values[id(one)] = kept

    def writes_until(self, after: Contents) -> Iterator[tuple[Any, ...]]:
        """Yield a key for each attribute whose content is another one at a later time."""
        alike = self.sizes == after.sizes and len(self.entries) == len(after.entries)
        if not alike or not all(map(operator.is_, self.entries, after.entries)):
            later = {each[:2]: at for at, each in enumerate(after.found)}
            for (index, name, one), size, content in zip(self.found, self.sizes, self.copies, strict=True):
                at = later.get((index, name))
                if at is None:
                    continue
                newer = after.copies[at]
                both = after.found[at][2] is one and content is not None and newer is not None
                if size != after.sizes[at] or (both and not _same(content, newer)):
                    yield "content", index, name
        for place, one in self.named.items():
            if after.named.get(place) is one:
                (_, count, values), (_, now, newer) = self.values[id(one)], after.values[id(one)]
                if count != now and values is not None and newer is not None and not torch.equal(values, newer):
                    yield "content", *place  # a trial puts values back, which counts as a change

    @contextmanager
    def back_in(self) -> Iterator[None]:
        """Give containers and tensors their contents back within the context. A large container only loses what was
        put to its end, and a large tensor keeps its values.
        """
        containers = zip((each[2] for each in self.found), self.sizes, self.copies, strict=True)
        before: list[tuple[Any, int, Any]] = [*self.values.values(), *containers]
        with torch.no_grad(), unfollowed():
            changed = [each for each in before if _has_changed(*each)]
            now = [(one, _copy(one)) for one, *_ in changed]
            for each in changed:
                _refill(*each)
        try:
            yield
        finally:
            with torch.no_grad(), unfollowed():
                for one, content in now:
                    _refill(one, 0, content)


def _values_of(tensor: Tensor) -> Tensor | None:
    """Return a copy of a small tensor without a gradient."""
    with torch.no_grad(), unfollowed():
        small = tensor.numel() <= _MOST_VALUES and tensor.layout == torch.strided and not tensor.requires_grad
        return tensor.detach().clone() if small else None


def _copy(one: Any) -> Any:
    return one.detach().clone() if isinstance(one, Tensor) else one.copy()


def _same(one: Any, other: Any) -> bool:
    """Tell whether two containers hold the same objects, or equal numbers and words."""
    if type(one) is not type(other) or len(one) != len(other):
        return False
    if isinstance(one, dict):
        return _same([*one], [*other]) and _same([*one.values()], [*other.values()])
    return all(map(same_value, one, other))


def same_value(one: Any, other: Any) -> bool:
    """Tell whether two values are the same object, or equal numbers or words."""
    return one is other or (type(one) is type(other) and isinstance(one, (int, float, str)) and bool(one == other))


def _has_changed(one: Any, size: int, content: Any) -> bool:
    if isinstance(one, Tensor):
        return content is not None and num_changes(one) != size
    return len(one) != size or (content is not None and not _same(content, one))


def _refill(one: Any, size: int, content: Any) -> None:
    if isinstance(one, Tensor):
        if one.shape == content.shape:
            one.copy_(content)
    elif content is not None:
        (refill_mapping if isinstance(one, dict) else refill_sequence)(one, content)
    else:
        for _ in range(len(one) - size):
            one.popitem() if isinstance(one, dict) else one.pop()
