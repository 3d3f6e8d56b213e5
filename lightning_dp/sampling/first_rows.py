"""FirstRows: the first records of a pass over a stream, by which a repetition of the records is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling.batches import LogicalBatch


class FirstRows:
    """The first records of a pass over a stream, which may not come again within the pass.

    **Guarantee**: found are records that come again in the same order, as in an endless stream, or if each worker reads
    all of it. Not found are repeated records that are shuffled, change at random or are no rows of a tensor or an
    array, and repetitions of fewer than 32 records, or of fewer than 8 different ones.

    Args:
        num_workers: processes that read the items of the pass by turns.
    """

    _FEW, _DIFFERENT, _COLUMNS = 32, 8, 16

    def __init__(self, num_workers: int) -> None:
        self._read: list[Tensor | None] = [None] * max(1, num_workers)  # last records of each worker
        self._first: Tensor | None = None
        self._column = self._number = 0
        self._differ = False

    def see(self, item: LogicalBatch) -> None:
        """Compare the records of the next item with the first ones of the pass.

        Raises:
            PrivacyError: the first records have come again.
        """
        worker = self._number % len(self._read)
        self._number += 1
        for count, batch in item.microbatches:
            rows, before = self._rows(count, batch), self._read[worker]
            if rows is None or (before is not None and before.shape[1] != rows.shape[1]):
                continue  # records of unequal length, say
            if self._first is None:
                rows = rows if before is None else torch.cat((before, rows))
                if worker == 0 and len(rows) >= self._FEW:
                    self._begin(rows[: self._FEW].clone())
                    before, rows = None, rows[1:]
            if self._first is not None:
                self._search(before, rows, self._first)
                kept = rows[1 - self._FEW :]
                rows = kept.clone() if before is None else torch.cat((before, kept))[1 - self._FEW :]
            self._read[worker] = rows

    def _begin(self, first: Tensor) -> None:
        """Store the first records, whether enough of them differ, and a column in which they differ most."""
        numbers = [len({*column}) for column in first.T.tolist()]
        self._differ = len({*map(tuple, first.tolist())}) >= self._DIFFERENT
        self._first, self._column = first, numbers.index(max(numbers))

    def _search(self, before: Tensor | None, rows: Tensor, first: Tensor) -> None:
        is_new = before is not None and len(before) >= self._FEW  # read before the first records were known
        if first.shape[1] != rows.shape[1] or not self._differ:
            return
        if not is_new and not (rows[:, self._column] == first[-1, self._column]).any():
            return
        rows = rows if before is None else torch.cat((before, rows))
        for place in range(len(rows) - self._FEW + 1):
            if torch.equal(rows[place : place + self._FEW], first):
                raise PrivacyError(
                    "Expected a stream to yield each record once per pass, got its first records again in the same "
                    "pass. Epsilon counts one use of a record per pass and would be too small: end a pass with the "
                    "last record, and let each worker yield a part by torch.utils.data.get_worker_info().id."
                )

    def _rows(self, count: int, batch: Any) -> Tensor | None:
        """Return a few values of each record, of the tensor that has most of them; None if there is none."""
        leaves = [torch.as_tensor(leaf) if _is_numbers(leaf) else leaf for leaf in tree_leaves(batch)]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
        found = [leaf for leaf in tensors if leaf.ndim and len(leaf) == count and leaf.numel()]
        if not found:
            return None
        rows = max(found, key=Tensor.numel).detach().reshape(count, -1)
        return rows[:, :: rows.shape[1] // self._COLUMNS + 1]


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "bif"
