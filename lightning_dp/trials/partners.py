"""Partner check: an item of the dataset is made of one record, not also of others that are drawn at random."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling.fetch import read
from lightning_dp.sampling.randomness import fresh_randomness

#: Random streams under which each item is read.
NUM_STREAMS = 4
#: Depth to which datasets and containers are followed, and the longest index whose entries are read.
_DEEPEST, _LONGEST = 4, 64
_NOTE = "_lightning_dp_note"

Log = set[tuple[int, int]]
"""Reads as pairs of a container and a row of it."""


def check_partners(dataset: Any, positions: list[int]) -> None:
    """Check that the rows that an item reads do not depend on random draws: mixup, random pairs and triplets.

    A copy of the dataset is read, in which everything with one row per item notes which rows are read: the dataset and
    datasets within it, lists, tensors, arrays, tables. NOT found: rows of globals, partners that are always the same,
    and partners that hardly any draw chooses.

    Args:
        dataset: with random access.
        positions: of the items that are read.

    Raises:
        PrivacyError: an item reads other rows under other draws, so one record would be in the items of others.
    """
    log: Log = set()
    try:
        twin = _noting(dataset, len(dataset), log, 0)
        readings = [[_rows(twin, position, stream, log) for stream in range(NUM_STREAMS)] for position in positions]
    except Exception:  # it cannot be copied, or its copy cannot be read
        return
    for found in readings:
        for container in {each for rows in found for each, _ in rows}:
            sets = [{row for each, row in rows if each == container} for rows in found]
            read_ones = [rows for rows in sets if rows]
            if set.union(*read_ones) != set.intersection(*read_ones):
                raise PrivacyError(
                    "An item of the dataset was read twice, and other random draws made it read other records, as "
                    "mixup and random pairs do. One record would then be part of many items, so it could move the sum "
                    "by more than the clipping norm. Mix or pair the parts of one record, or fix each pair in advance "
                    "and use no record in two (check_per_sample=False accepts it, outside the guarantee)."
                )


def _rows(twin: Any, position: int, stream: int, log: Log) -> Log:
    log.clear()
    with fresh_randomness(stream):
        read(twin, [position])
    return set(log)


def _noting(value: Any, size: int, log: Log, depth: int) -> Any:
    """Return a copy whose parts with one row per item of their dataset note which rows are read; else the value."""
    if depth > _DEEPEST or isinstance(value, (str, bytes, type)):
        return value
    if isinstance(value, Dataset):
        size = len(value) if hasattr(value, "__len__") else -1
        twin = copy.copy(value)
        for name, held in vars(value).items():
            vars(twin)[name] = _noting(held, size, log, depth + 1)
        return _with_notes(twin, id(value), size, log)
    if hasattr(value, "__getitem__") and hasattr(value, "__len__") and len(value) == size:
        with suppress(Exception):  # objects of compiled classes take no notes
            return _with_notes(_shallow(value), id(value), size, log)
    if type(value) in (list, tuple) and len(value) <= _LONGEST:
        return type(value)(_noting(each, size, log, depth + 1) for each in value)
    if type(value) is dict and len(value) <= _LONGEST:
        return {name: _noting(each, size, log, depth + 1) for name, each in value.items()}
    return value


def _shallow(value: Any) -> Any:
    """Return another object over the same content, of a class that can take notes."""
    kind: Any = type(value)
    if isinstance(value, Tensor):
        return value.as_subclass(_class_of(kind))
    if isinstance(value, np.ndarray):
        return value.view(_class_of(kind))
    return _class_of(kind)(value) if kind in (list, tuple, dict) else copy.copy(value)


def _with_notes(value: Any, container: int, size: int, log: Log) -> Any:
    def note(index: Any) -> None:
        log.update((container, row % size) for row in _rows_of(index) if -size <= row < size)

    kind: Any = type(value)
    value.__class__ = _class_of(kind)
    vars(value)[_NOTE] = note
    return value


@functools.lru_cache(256)
def _class_of(base: Any) -> Any:
    """Return a subclass whose objects note the indices of their reads."""
    if _NOTE in vars(base):
        return base

    def read_row(self: Any, index: Any) -> Any:
        vars(self).get(_NOTE, len)((index,))
        return base.__getitem__(self, index)

    def indexer(name: str) -> property:
        return property(lambda self: _Indexer(getattr(base, name).__get__(self), vars(self).get(_NOTE, len)))

    tables = {name: indexer(name) for name in ("iloc", "loc") if isinstance(getattr(base, name, None), property)}
    return type(base.__name__, (base,), {"__module__": base.__module__, "__getitem__": read_row, _NOTE: True, **tables})


class _Indexer:
    """An indexer of a table that notes the rows that are read."""

    def __init__(self, indexer: Any, note: Any) -> None:
        self._indexer, self._note = indexer, note

    def __getitem__(self, index: Any) -> Any:
        self._note((index,))
        return self._indexer[index]


def _rows_of(index: Any) -> Iterator[int]:
    """Yield the rows that an index names one by one; none for slices, masks and long arrays."""
    if isinstance(index, tuple):
        index = index[0] if index else ()
        index = index[0] if isinstance(index, tuple) and index else index
    if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
        yield int(index)
    elif isinstance(index, (list, np.ndarray, Tensor)):
        values = torch.as_tensor(index)
        if values.numel() <= _LONGEST and not values.is_floating_point() and values.dtype != torch.bool:
            yield from map(int, values.flatten())
