"""The row of each record in a collated batch, where the collate function sorts its records, as by their lengths.

The clipped sum over a batch is the same in any order of its rows. The order matters to checks, which follow a record
from batch to batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample.batch_reading import Path, walk
from lightning_dp.step.given_records import Collated
from lightning_dp.step.kept_tensors import same_values
from lightning_dp.step.reading import is_same


class RowOrder:
    """A finder of the row of each record, by values that a record has when it is collated alone.

    **Guarantee**: the rows of different records differ. Whether they are the right ones decides which gradients a check
    compares; records without a row of their values keep their order, which fails a check if they are sorted.

    Args:
        collate: collates records.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate
        self.is_followed = False
        """True once a check has found gradients in another order than the records."""
        self._alone: dict[int, tuple[Any, dict[Path, Any]]] = {}  # id -> record, and its parts if collated alone

    def rows_of(self, records: list[Any]) -> Tensor | None:
        """Return the row of each record in their batch, shape (B,); None if they keep their order."""
        if not self.is_followed or len(records) < 2 or isinstance(records, Collated):
            return None
        known, self._alone = self._alone, {}
        for record in records:
            self._alone[id(record)] = known.get(id(record)) or (record, _parts(self._collate([record])))
        return _assigned(_parts(self._collate(records)), [self._alone[id(record)][1] for record in records])

    def by_record(self, records: list[Any], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients of rows in the order of the records."""
        order = self.rows_of(records)
        return gradients if order is None else {name: rows[order.to(rows.device)] for name, rows in gradients.items()}


def _parts(batch: Any) -> dict[Path, Any]:
    return {path: part for path, part, _ in walk(batch) if isinstance(part, (Tensor, list))}


def _assigned(batch: dict[Path, Any], alone: list[dict[Path, Any]]) -> Tensor | None:
    """Give each record a row of its values, the longest record first: a shorter one may be the beginning of it."""
    free = list(range(len(alone)))
    rows = torch.tensor(free)
    lengths = [sum(part.numel() for part in parts.values() if isinstance(part, Tensor)) for parts in alone]
    for number in sorted(range(len(alone)), key=lambda each: -lengths[each]):
        pairs = [(part, batch[path]) for path, part in alone[number].items() if path in batch]
        row = next((row for row in free if all(_is_at(row, *pair, len(alone)) for pair in pairs)), None)
        if row is None:
            return None
        free.remove(row)
        rows[number] = row
    return rows


def _is_at(row: int, alone: Any, batch: Any, size: int) -> bool:
    """Tell whether a part of a batch has the values of a record in a row, before what fills it up; True if it has no
    rows of records.
    """
    if isinstance(alone, list) or isinstance(batch, list):
        return (len(alone), len(batch)) != (1, size) or is_same(alone[0], batch[row])
    for axis in range(min(2, alone.dim(), batch.dim())):
        if (alone.shape[axis], batch.shape[axis]) == (1, size):
            own, other = alone.select(axis, 0), batch.select(axis, row)
            for other_axis, length in enumerate(own.shape):
                other = other.narrow(other_axis, 0, min(length, other.shape[other_axis]))
            return same_values(own, other)
    return True
