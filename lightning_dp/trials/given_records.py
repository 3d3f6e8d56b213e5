"""Records that a trial gets in another way than from the dataset before it runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Collated(list[Any]):
    """Records with the batch that was made of them.

    Args:
        count: number of records.
        batch: on the host; a run moves a copy to the device.
        rows: row of each record in the batch; None if records keep their order.
    """

    def __init__(self, count: int, batch: Any, rows: Tensor | None = None) -> None:
        super().__init__([None] * count)
        self.batch, self.rows = batch, rows


class Reread(list[Any]):
    """The last records of a batch. Each run reads all of its records from the dataset again, and collates them in
    microbatches, since this may write something.

    Args:
        records: as they were read now.
        positions: of all records of the batch, in the dataset.
    """

    def __init__(self, records: list[Any], positions: list[int]) -> None:
        super().__init__(records)
        self.positions = positions

    def last(self, most: int) -> Reread:
        """Return the last microbatch, of that many records at most."""
        return Reread(self[-most:], self.positions)
