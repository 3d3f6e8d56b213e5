"""Repeat check: datasets that make more positions of their records are refused, and others are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_dp import PrivacyError
from lightning_dp.trials.repeats import check_repeats
from tests.helpers import make_dataset
from tests.loops import start, train

NUM = 30
RECORDS = torch.randn(NUM, 3)


class Folded(Dataset[Any]):
    """Records at the positions that a function makes of an index, with noise if asked."""

    def __init__(self, length: int, place: Any, *, draws: bool = False, records: Any = RECORDS) -> None:
        self.length, self.place, self.draws, self.records = length, place, draws, records
        self.number, self.array = np.int64(3), np.array(3)  # which have no length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        record = self.records[self.place(index)]
        return record + torch.randn(3) if self.draws else record


REPEATED = [
    Folded(2 * NUM, lambda index: index % NUM),
    Folded(6 * NUM, lambda index: index % NUM, draws=True),
    Folded(100, lambda index: index % NUM),
    Folded(3 * NUM, lambda index: index // 3),
    Folded(100, lambda index: index // 4),
    Folded(10 * NUM, lambda index: index // 10, draws=True),
    Subset(Folded(6 * NUM, lambda index: index % NUM), torch.randperm(6 * NUM)[:100].tolist()),
    ConcatDataset([Folded(2 * NUM, lambda index: index % NUM), torch.randn(40, 3)]),
]
ONCE = [
    Folded(NUM, lambda index: index, draws=True),
    Folded(NUM, lambda index: -1 - index),
    Folded(2 * NUM, lambda index: index, records=torch.randn(2 * NUM, 3)),
    Folded(2 * NUM, lambda index: index, records=torch.zeros(2 * NUM, 3)),
    Folded(4 * NUM, lambda index: index, records=torch.arange(4).repeat(NUM)),
    Folded(4 * NUM, lambda index: index, records=torch.arange(4).repeat_interleave(NUM)),
    Folded(2 * NUM, lambda index: index, records=[*RECORDS] * 2),
    Subset(Folded(2 * NUM, lambda index: index % NUM), range(NUM)),
]


@pytest.mark.parametrize("dataset", REPEATED)
def test_records_at_several_positions_are_refused(dataset: Any) -> None:
    with pytest.raises(PrivacyError, match="each record at one position"):
        check_repeats(dataset)


@pytest.mark.parametrize("dataset", ONCE)
def test_records_at_one_position_pass(dataset: Any) -> None:
    check_repeats(dataset)


def test_items_that_cannot_be_read_are_left_to_the_step() -> None:
    check_repeats(Folded(2 * NUM, lambda index: [][index]))


def test_a_run_counts_repeated_records_as_those_of_one_user() -> None:
    records = [*make_dataset(32, dtype=torch.float64)]
    loader = DataLoader(Folded(64, lambda index: index % 32, records=records), batch_size=8)
    with start(loader=loader, steps=1) as private, pytest.raises(PrivacyError, match="each record at one position"):
        train(private, 1)
    ids = [index % 32 for index in range(64)]
    with start(loader=loader, steps=1, unit=ids, records_per_unit=2) as private:
        train(private, 1)
        assert private.steps_taken == 1
