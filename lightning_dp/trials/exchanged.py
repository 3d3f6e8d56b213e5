"""A batch in which one record is exchanged before it is collated, next to the batch itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_dp.per_sample.owners.batch_reading import walk
from lightning_dp.sandbox.kept_tensors import same_values
from lightning_dp.trials.given_records import Collated


class Exchanged(NamedTuple):
    """A small batch as the collate function makes it, and with one record exchanged for another. Private.

    Args:
        place: index of the exchanged record.
        num_records: of the batch.
        real: the batch of these records.
        other: the batch with the exchanged record.
        rows: row of each record in the one and in the other batch; None if records keep their order.
    """

    place: int
    num_records: int
    real: Any
    other: Any
    rows: tuple[Tensor, Tensor] | None = None

    def spread(self) -> set[Any]:
        """Return the paths of the values of other records that the exchange has changed; empty if shapes differ."""
        found: set[Any] = set()
        pairs = list(zip(leaves_of(self.real, self.num_records), leaves_of(self.other, self.num_records), strict=False))
        if any(one.shape != other.shape for (_, one), (_, other) in pairs):
            return found
        for (path, one), (_, other) in pairs:
            if self.place in path or same_values(one, other):  # within a list of the records' own values
                continue
            axes = [axis for axis, size in enumerate(one.shape) if size == self.num_records]
            differs = _difference(one, other)
            if not any(_only_at(self._by_record(one, other, axis), self.place) for axis in axes):
                # parts of records that are joined to one tensor: their number differs from record to record
                found.add((*(each for each in path if type(each) is str), bool(axes or differs.double().mean() > 0.5)))
        return found

    def but(self, **values: Any) -> Exchanged:
        """Return the same with other values of some fields."""
        return self._replace(**values)

    def collated(self) -> tuple[Collated, Collated]:
        """Return both batches as records that a trial can run."""
        rows = self.rows or (None, None)
        return Collated(self.num_records, self.real, rows[0]), Collated(self.num_records, self.other, rows[1])

    def _by_record(self, one: Tensor, other: Tensor, axis: int) -> Tensor:
        """Return where two tensors differ, records first."""
        one, other = one.movedim(axis, 0), other.movedim(axis, 0)
        return _difference(one, other) if self.rows is None else _difference(one[self.rows[0]], other[self.rows[1]])


def _difference(one: Tensor, other: Tensor) -> Tensor:
    return (one != other) & ~((one != one) & (other != other))


def _only_at(differs: Tensor, place: int) -> bool:
    """Tell whether a mask is true at one index of its first axis only."""
    at = differs.reshape(len(differs), -1).any(1)
    at[place] = False
    return not bool(at.any())


def leaves_of(value: Any, count: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield the arrays and tensors that are reachable from a batch or a record, each with its path: names, and indices
    of sequences with one entry per record.
    """
    for path, part, _ in walk(
        value, lambda holder, key: key if isinstance(holder, (list, tuple)) and len(holder) == count else str(key)
    ):
        if isinstance(part, Tensor):
            if part.layout == torch.strided and not part.is_quantized:
                yield path, part.detach()
        elif isinstance(part, np.ndarray) and part.dtype.kind in "biufc":
            yield path, torch.as_tensor(part)
