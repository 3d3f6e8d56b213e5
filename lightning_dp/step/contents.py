"""Contents of containers and tensors that user code keeps, and changes in place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.step.refilling import refill_mapping, refill_sequence
from lightning_dp.step.snapshot import NOT_PLAIN
from lightning_dp.system.torch_private import num_changes

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
    """

    def __init__(self, held: list[dict[str, Any]], buffers: list[Tensor]) -> None:
        with torch.no_grad(), unfollowed():
            self._kept = [
                {
                    name: (one, *_read(one))
                    for name, one in each.items()
                    if type(one) in _WATCHED and name not in NOT_PLAIN
                }
                for each in held
            ]
            self._buffers = [(one, *_read(one)) for one in buffers]

    def writes_until(self, after: Contents) -> Iterator[tuple[Any, ...]]:
        """Yield a key for each attribute whose content is another one at a later time."""
        for index, (before, later) in enumerate(zip(self._kept, after._kept, strict=False)):
            for name, (one, size, content) in before.items():
                other, now, newer = later.get(name, (None, size, None))
                both = content is not None and newer is not None
                if isinstance(one, Tensor):  # a trial puts values back, which counts as a change
                    differs = both and one is other and size != now and not torch.equal(content, newer)
                else:
                    differs = size != now or (both and not _same(content, newer))
                if differs:
                    yield "content", index, name

    @contextmanager
    def back_in(self) -> Iterator[None]:
        """Give containers and tensors their contents back within the context. A large container only loses what was
        put to its end, and a large tensor keeps its values.
        """
        before = [*self._buffers, *(kept for each in self._kept for kept in each.values())]
        with torch.no_grad(), unfollowed():
            now = [(one, _copy(one)) for one, size, content in before if _has_changed(one, size, content)]
            for one, size, content in before:
                if _has_changed(one, size, content):
                    _refill(one, size, content)
        try:
            yield
        finally:
            with torch.no_grad(), unfollowed():
                for one, content in now:
                    _refill(one, 0, content)


def _read(one: Any) -> tuple[int, Any]:
    """Return the size of a container, or the number of changes of a tensor; with the content if there is not much."""
    if isinstance(one, Tensor):
        small = one.numel() <= _MOST_VALUES and one.layout == torch.strided and not one.requires_grad
        return num_changes(one), one.detach().clone() if small else None
    size = len(one)
    return size, _copy(one) if size <= _MOST_ENTRIES else None


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
