"""The row of each record in a collated batch, where the collate function sorts its records, as by their lengths.

The clipped sum over a batch is the same in any order of its rows. The order matters to checks, which follow a record
from batch to batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_dp.per_sample.owners.batch_reading import Path, walk
from lightning_dp.trials.given_records import Collated
from lightning_dp.trials.reading import is_same


class RowOrder:
    """A finder of the row of each record, by values that a record has when it is collated alone.

    **Guarantee**: the rows of different records differ. Whether they are the right ones decides which gradients a check
    compares; records without a row of their values keep their order, which fails a check if they are sorted.

    Args:
        collate: collates records.
        is_followed: see the attribute.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], *, is_followed: bool = False) -> None:
        self._collate = collate
        self.is_followed = is_followed
        """True once a check has found gradients in another order than the records."""
        self._alone: dict[int, tuple[Any, dict[Path, Any]]] = {}  # id -> record, and its parts if collated alone

    def rows_of(self, records: list[Any]) -> Tensor | None:
        """Return the row of each record in their batch, shape (B,); None if they keep their order."""
        if not self.is_followed or len(records) < 2 or isinstance(records, Collated):
            return records.rows if isinstance(records, Collated) and self.is_followed else None
        known, self._alone = self._alone, {}
        for record in records:
            self._alone[id(record)] = known.get(id(record)) or (record, _parts(self._collate([record])))
        return _assigned(_parts(self._collate(records)), [self._alone[id(record)][1] for record in records])

    def by_record(self, records: list[Any], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients of rows in the order of the records."""
        order = self.rows_of(records)
        return gradients if order is None else {name: rows[order.to(rows.device)] for name, rows in gradients.items()}


def _parts(batch: Any) -> dict[Path, Any]:
    parts = {path: part for path, part, _ in walk(batch) if isinstance(part, (Tensor, list, PackedSequence))}
    return {path: pad_packed_sequence(p)[0] if isinstance(p, PackedSequence) else p for path, p in parts.items()}


def _assigned(batch: dict[Path, Any], alone: list[dict[Path, Any]]) -> Tensor | None:
    """Give each record the row of its values, the longest record first: a shorter one may be the beginning of it.

    Returns None if no row has these values, or if different rows have.
    """
    free = [*range(len(alone))]
    rows = torch.tensor(free)
    lengths = [sum(part.numel() for part in parts.values() if isinstance(part, Tensor)) for parts in alone]
    held = [(part, [each[path] for each in alone if path in each]) for path, part in batch.items()]
    parts = [found for part, each in held if (found := _by_record(part, each)) is not None]
    parts.sort(key=lambda part: type(part[0]) is list)  # lists take longer
    for number in sorted(range(len(alone)), key=lambda each: -lengths[each]):
        left = free
        for values, own in parts:
            left = [*_that_begin_with(own[number], values, left)]
        if not left:
            return None
        first, *others = left
        if not all(is_same(values[first], values[other]) for values, _ in parts for other in others):
            return None
        free.remove(first)
        rows[number] = first
    return rows


def _by_record(batch: Any, alone: list[Any]) -> tuple[Any, list[Any]] | None:
    """Return a part of a batch by row, and what each record has in it; None if it has no row for each record."""
    size = len(alone)
    if isinstance(batch, list) and all(isinstance(part, list) for part in alone):
        return (batch, [part[0] for part in alone]) if len(batch) == size and {*map(len, alone)} == {1} else None
    if isinstance(batch, Tensor) and all(isinstance(part, Tensor) and part.dim() == batch.dim() for part in alone):
        for axis in range(min(2, batch.dim())):
            if batch.shape[axis] == size and all(part.shape[axis] == 1 for part in alone):
                return batch.movedim(axis, 0), [part.select(axis, 0) for part in alone]
    return None


def _that_begin_with(own: Any, values: Any, rows: list[int]) -> Iterator[int]:
    """Yield those of some rows that have the values of a record, before what fills them up."""
    if not isinstance(values, Tensor):
        yield from (row for row in rows if is_same(own, values[row]))
        return
    for axis, length in enumerate(own.shape):
        values = values.narrow(axis + 1, 0, min(length, values.shape[axis + 1]))
    if values.shape[1:] == own.shape:
        equal = (values == own) | ((values != values) & (own != own))
        have = equal.reshape(len(values), -1).all(1).tolist()
        yield from (row for row in rows if have[row])
