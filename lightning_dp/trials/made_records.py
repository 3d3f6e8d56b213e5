"""Records that are made for checks: of the shapes of a real record, with other values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_dp.per_sample._torch import dense_parts_of
from lightning_dp.per_sample.owners.batch_reading import read

_MOST_PARTS = 8
"""Parts of a record that are made incomplete one by one."""


def spoiled(record: Any, value: float, part: int | None = None) -> Any:
    """Return a record with all floating-point values replaced by one value; the same record if it has none.

    Args:
        record: a record.
        value: the value.
        part: number of the tensor, array or number to replace alone; default: all of them.
    """
    number = count(0)

    def replaced(leaf: Any) -> Any:
        if not _has_floats(leaf) or (part is not None and next(number) != part):
            return leaf
        if isinstance(leaf, Tensor):
            made = torch.empty_like(leaf) if leaf.layout is torch.strided else leaf.detach().clone()
            dense_parts_of(made)[-1].fill_(value)
            return made
        return value if isinstance(leaf, float) else np.full_like(leaf, value)

    return tree_map(replaced, record)


def extremes(record: Any, values: Iterable[float]) -> list[Any]:
    """Return a record of the shapes of a record for each value that all its floating-point values get; an empty list if
    it has none.
    """
    return [spoiled(record, value) for value in values] if has_floats(record) else []


def incomplete(record: Any, most: int) -> list[list[Callable[[Any], Any]]]:
    """Return functions that make a record incomplete in ways that user code may fill up from other records: one of its
    parts zero or NaN, as if it had not been observed, or all infinite.

    Args:
        record: an example.
        most: number of functions in a group. Their records may be in one batch: none hides what another one shows.
    """
    parts = range(min(_MOST_PARTS, sum(map(_has_floats, tree_leaves(record)))))
    groups: list[list[Callable[[Any], Any]]] = [
        [partial(spoiled, value=value, part=part) for part in parts[start : start + most]]
        for value in (0.0, float("nan"))
        for start in range(0, len(parts), most)
    ]
    infinite: list[Callable[[Any], Any]] = [partial(spoiled, value=float("inf"))]
    return [*groups, infinite] if parts else []


def has_floats(record: Any) -> bool:
    """Tell whether a record has floating-point values."""
    return any(map(_has_floats, tree_leaves(record)))


def _has_floats(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.is_floating_point()
    return isinstance(leaf, float) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f")


def of_one_row(record: Any, other: Any) -> Any:
    """Return a copy of a record in which all rows of each tensor and array are its last row; None if it has no copy.

    It has the shapes of the record, and whole numbers that the record has in the same columns.

    Args:
        record: a record.
        other: a record of another shape, which shows along which axis the rows of a tensor are.
    """
    try:
        made = copy.deepcopy(record)
        for leaf, like in zip(_arrays(made), _arrays(other), strict=True):
            sizes = zip(leaf.shape, like.shape, strict=False)
            axis = next((axis for axis, (one, two) in enumerate(sizes) if one != two), None)
            if axis is None or leaf.shape[axis] == 0:
                continue
            if isinstance(leaf, Tensor):
                leaf.copy_(leaf.narrow(axis, -1, 1).clone().expand_as(leaf))
            else:
                leaf[...] = np.take(leaf, [-1], axis)
    except Exception:  # an object that cannot be copied, or written to
        return None
    return made


def apart(records: list[Any]) -> list[Any]:
    """Return records with tensors of their own: one that was read twice is copied, if it can be.

    Whatever follows a tensor to the record that holds it finds one record.

    Example:
        >>> x = torch.zeros(2)
        >>> one, two = apart([{"x": x}, {"x": x}])
        >>> one["x"] is x, two["x"] is x
        (True, False)
    """
    seen, made = set[frozenset[int]](), []
    for record in records:
        own, held = record, frozenset(map(id, _arrays(record)))
        if held and held in seen:
            with suppress(Exception):  # of an object that cannot be copied
                own = copy.deepcopy(record)
        seen.add(held)
        made.append(own)
    return made


def _arrays(record: Any) -> list[Any]:
    found = [*tree_leaves(record), *(thing for _, thing in read(record)[0])]
    return [*{id(leaf): leaf for leaf in found if isinstance(leaf, (Tensor, np.ndarray))}.values()]
