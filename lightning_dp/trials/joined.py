"""Unequal parts of records that a collate function joins along one axis, such as the points of several clouds.

If three records have 3, 0 and 0 rows, their batch holds 3 rows, as many as there are records. The position of a row
then does not tell which record it belongs to.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_dp.per_sample.owners.batch_reading import DEEPEST, SINGLE, shapes_in, walk


class _Attributes:
    """A class without slots or a base class."""


def unequal_sums(records: list[Any]) -> set[int]:
    """Return the sum of each length that differs from record to record.

    Args:
        records: of a batch.

    Example:
        >>> import torch
        >>> unequal_sums([torch.zeros(2, 5), torch.zeros(0, 5), torch.zeros(1, 5)])
        {3}
    """
    quick = [_quick_lengths(record, [], 0) for record in records]
    first = quick[0]
    if first is not None and all(lengths == first for lengths in quick):
        return set()
    columns: dict[Any, list[int]] = {}
    plain = [lengths for lengths in quick if lengths is not None]
    if len(plain) == len(records) and len({*map(_names_in, plain)}) == 1:
        columns = {place: [*each] for place, each in enumerate(zip(*plain, strict=True)) if type(each[0]) is int}
    else:
        for lengths in map(lengths_in, records):
            for path, length in lengths.items():
                columns.setdefault(path, []).append(length)
    return {sum(column) for column in columns.values() if len(column) < len(records) or len({*column}) > 1}


def joined_lengths(sums: set[int], num_records: int, stacked: Counter[Any], batch: Any) -> set[int | tuple[int, ...]]:
    """Return the sums that are lengths of axes of a batch. A sum that happens to be the number of records counts only
    at a tensor that no other part of a record explains, with one entry for each record; if there is one, the shapes
    that only tensors have which are explained so are returned too.

    Args:
        sums: of lengths that differ from record to record.
        num_records: of the batch.
        stacked: see ``stacked_shapes``.
        batch: as the collate function made it.

    Example:
        >>> import torch
        >>> records = [(torch.zeros(4), torch.zeros(num, 7)) for num in (2, 0, 1)]
        >>> first, second = zip(*records)
        >>> [joined_lengths({3}, 3, stacked_shapes(records[0]), (torch.stack(first), *more))
        ...  for more in ([second], [torch.cat(second)])]
        [set(), {3, (3, 4)}]
    """
    left, found, explained, joined = stacked.copy(), set[int](), set[tuple[int, ...]](), set[tuple[int, ...]]()
    for shape in shapes_in(batch):
        lengths = sums.intersection(shape)
        if num_records in lengths and left[rest := _rest(shape, num_records)] > 0:
            left[rest] -= 1
            lengths.discard(num_records)
            explained.add(shape)
        if lengths:
            joined.add(shape)
            found |= lengths
    return {*found, *(explained - joined)} if found else set()


def stacked_shapes(record: Any) -> Counter[Any]:
    """Return how often a record has parts of each shape, with sorted axes; () stands for single values."""
    found: Counter[Any] = Counter()
    for _, part, items in walk(record):
        if isinstance(part, (Tensor, np.ndarray)):
            found[tuple(sorted(part.shape))] += 1
        elif isinstance(part, list) and part and SINGLE.issuperset(map(type, part)):
            found[(len(part),)] += 1
        else:
            found[()] += sum(isinstance(value, (int, float, str, np.generic)) for _, value in items)
    return found


def _rest(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Return the other axes of a shape, after one axis of a length."""
    axis = shape.index(length)
    return tuple(sorted(shape[:axis] + shape[axis + 1 :]))


def _quick_lengths(record: Any, found: list[Any], depth: int) -> list[Any] | None:
    """Append the names and lengths in a record of tensors and lists of numbers; return None for others, and for
    subclasses of these.
    """
    kind = type(record)
    if kind is Tensor:
        found += record.shape
    elif kind is list:
        if not SINGLE.issuperset(map(type, record)):
            return None
        found.append(len(record))
    elif kind in SINGLE:
        pass
    elif kind is not tuple and kind is not dict and not _has_attributes_only(kind):  # type: ignore[arg-type]
        return None
    else:
        named: Any = record if kind is dict else () if kind is tuple else vars(record)
        found += (kind, *named)
        for each in named.values() if kind is not tuple else record:
            if type(each) not in SINGLE and (depth > DEEPEST or _quick_lengths(each, found, depth + 1) is None):
                return None
    return found


@functools.cache
def _has_attributes_only(kind: type) -> bool:
    """Tell whether objects of a class hold no more than ``vars`` tells: no slots, entries or memory of their own."""
    sizes = [(one.__basicsize__, one.__itemsize__) for one in (kind, _Attributes)]
    return sizes[0] == sizes[1] and any("__dict__" in vars(one) for one in kind.__mro__)


def _names_in(lengths: list[Any]) -> tuple[Any, ...]:
    return tuple([None if type(one) is int else one for one in lengths])


def lengths_in(record: Any) -> Counter[Any]:
    """Return the lengths of axes and lists in a record by path; those in a list are added up."""
    found: Counter[Any] = Counter()
    for path, part, _ in walk(record, lambda holder, key: list if isinstance(holder, list) else key):
        if isinstance(part, list):
            found[path] += len(part)
        tensor = part.data if isinstance(part, PackedSequence) else part
        for axis, length in enumerate(tensor.shape if isinstance(tensor, (Tensor, np.ndarray)) else ()):
            found[path, axis] += length
    return found
