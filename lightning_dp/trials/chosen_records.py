"""The choice of records for checks, by their shapes and whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_dp.per_sample.owners.batch_reading import shapes_in
from lightning_dp.trials.reading import is_same


def most_different(record: Any, others: list[Any]) -> list[Any]:
    """Return the record with the rarest other whole numbers (a label, say), and the first of another shape, or any that
    is not the same.
    """
    numbers, own = [repr(whole_numbers(other)) for other in others], repr(whole_numbers(record))
    differing = [(numbers.count(one), at) for at, one in enumerate(numbers) if one != own]
    chosen = [others[at] for _, at in sorted(differing)[:1]]
    chosen += [other for other in others if shape_of(other) != shape_of(record)][:1]
    return chosen or [other for other in others if not is_same(record, other)][:1] or others[:1]


def whole_numbers(record: Any) -> list[Any]:
    """Return whole numbers and words of a record, at most 64 of each of its arrays."""
    found: list[Any] = []
    for leaf in tree_leaves(record):
        whole = isinstance(leaf, Tensor) and not leaf.is_floating_point() and not leaf.is_complex()
        if isinstance(leaf, (int, str)):
            found.append(leaf)
        elif whole or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biu"):
            found.extend(leaf.reshape(-1)[:64].tolist())
    return found


def differing(records: list[Any]) -> list[Any]:
    """Return the records reordered, so that the first ones differ in shape."""
    seen: set[Any] = set()
    first: list[Any] = []
    rest: list[Any] = []
    for record in records:
        shape = shape_of(record)
        (rest if shape in seen else first).append(record)
        seen.add(shape)
    return first + rest


def shape_of(record: Any) -> Any:
    """Return the shapes and lengths of all values in a record, for comparison with another record."""
    return tuple(map(_shape_of, tree_leaves(record)))


def _shape_of(leaf: Any) -> Any:
    if hasattr(leaf, "shape"):
        return tuple(leaf.shape)
    inside = () if isinstance(leaf, str) else shapes_in(leaf)
    return inside or (len(leaf) if hasattr(leaf, "__len__") else None)
