"""Streams that yield their records again within one pass, of which epsilon counts one use of each record."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling import private_dataloader


class Stream(IterableDataset[Any]):
    """Yields records once or without end, and to each worker all of them or a part."""

    def __init__(self, records: Tensor, *, endless: bool = False, shares: bool = True) -> None:
        self.records, self.endless, self.shares = records, endless, shares

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info() if self.shares else None
        records = self.records if worker is None else self.records[worker.id :: worker.num_workers]
        yield from records
        while self.endless:
            yield from records


def num_read(stream: Stream, most: int, *, batch_size: int = 8, **options: Any) -> int:
    """Return how many items of two passes are read, at most some number of each."""
    found = 0
    loader = private_dataloader(DataLoader(stream, batch_size=batch_size, **options), sampling="shuffle")
    for _ in range(2):
        found += sum(1 for _ in itertools.islice(loader, most))
    return found


RECORDS = torch.randn(44, 3)


@pytest.mark.parametrize("batch_size", [1, 8, 40, 100])
def test_an_endless_stream_is_refused(batch_size: int) -> None:
    with pytest.raises(PrivacyError, match="its first records again"):
        num_read(Stream(RECORDS, endless=True), 100, batch_size=batch_size)
    num_steps = -(-44 // batch_size)
    assert num_read(Stream(RECORDS), 100, batch_size=batch_size) == 2 * num_steps


def test_workers_that_read_the_same_records_are_refused() -> None:
    assert num_read(Stream(RECORDS), 100, num_workers=2) == 12
    with pytest.raises(PrivacyError, match="get_worker_info"):
        num_read(Stream(RECORDS, shares=False), 100, num_workers=2)


@pytest.mark.parametrize("records", [torch.zeros(44, 3), torch.arange(4).repeat(11)[:, None]])
def test_records_of_few_values_may_look_alike(records: Tensor) -> None:
    assert num_read(Stream(records, endless=True), 20) == 40


def test_records_without_rows_are_not_compared() -> None:
    assert num_read(Stream(RECORDS, endless=True), 20, collate_fn=lambda records: "words") == 40
