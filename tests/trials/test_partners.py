"""Partner check: items that random draws make of several records are refused, whatever holds the records."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_dp import PrivacyError
from lightning_dp.trials.partners import check_partners

NUM = 40


class Held(Dataset[Any]):
    """Records in a container; ``item`` makes an item of the container and a position."""

    def __init__(self, held: Any, item: Callable[[Any, int], Any]) -> None:
        self.held, self.item = held, item

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Any:
        return self.item(self.held, index)


class Itself(Held):
    """The partner is an item of the same dataset."""

    def __getitem__(self, index: int) -> Any:
        partner = random.randrange(NUM)
        return self.held[index] if index == partner else (self.held[index], self[partner])


def value(row: Any) -> float:
    return float(np.asarray(row[0] if isinstance(row, tuple) else row).sum())


def alone(held: Any, index: int) -> float:
    return value(held[index]) + random.random()


def mixed(held: Any, index: int) -> float:
    return value(held[index]) + value(held[random.randrange(NUM)])


def paired_now_and_then(held: Any, index: int) -> float:
    return mixed(held, index) if torch.rand(()) < 0.5 else alone(held, index)


def triplet(held: Any, index: int) -> Any:
    return held[[index, *random.sample(range(NUM), 2)]]


HOLDERS = {
    "list": lambda: [*map(float, range(NUM))],
    "tensor": lambda: torch.arange(NUM),
    "array": lambda: np.arange(NUM),
    "dataset": lambda: TensorDataset(torch.arange(NUM)),
    "subset": lambda: Subset(TensorDataset(torch.arange(2 * NUM)), [*range(NUM)]),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("item", [mixed, paired_now_and_then])
def test_partners_drawn_at_random_are_refused(holder: str, item: Any) -> None:
    with pytest.raises(PrivacyError, match="made it read other records"):
        check_partners(Held(HOLDERS[holder](), item), [3, 20, 31])


@pytest.mark.parametrize("holder", HOLDERS)
def test_items_of_one_record_with_random_changes_pass(holder: str) -> None:
    data = Held(HOLDERS[holder](), alone)
    check_partners(data, [3, 20, 31])
    assert type(data) is Held
    assert type(data.held) is type(HOLDERS[holder]())


@pytest.mark.parametrize(
    "data",
    [
        Held(np.arange(NUM), triplet),
        Itself([*range(NUM)], alone),
        Held({"x": np.arange(NUM)}, lambda held, index: mixed(held["x"], index)),
        Held((torch.arange(NUM), torch.arange(NUM)), lambda held, index: (held[0][index], mixed(held[1], index))),
        Subset(Held([*range(NUM)], mixed), [*range(10)]),
    ],
    ids=["rows of an index", "items of itself", "within a dict", "within a tuple", "behind a subset"],
)
def test_partners_are_found_wherever_they_are_held(data: Any) -> None:
    with pytest.raises(PrivacyError, match="made it read other records"):
        check_partners(data, [1, 4, 8])


@pytest.mark.parametrize(
    "item",
    [
        lambda held, index: value(held[NUM - 1 - index]),
        lambda held, index: value(held[index : index + 3]),
        lambda held, index: value(held[index]) if random.random() < 0.5 else 0.0,
        lambda held, index: value(held[random.sample([index, (index + 1) % NUM], 2)]),
    ],
    ids=["another order", "a window", "no read", "the same rows"],
)
def test_reads_that_no_draw_changes_pass(item: Any) -> None:
    check_partners(Held(np.arange(NUM), item), [3, 20, 31])


def test_rows_of_tables_are_noted() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"x": range(NUM)})
    check_partners(Held(table, lambda held, index: held.iloc[index]["x"] + random.random()), [3, 20])
    with pytest.raises(PrivacyError, match="made it read other records"):
        check_partners(Held(table, lambda held, index: held.iloc[random.randrange(NUM)]["x"]), [3, 20])


def test_data_that_cannot_be_copied_are_read_as_they_are() -> None:
    class Single(Held):
        def __copy__(self) -> Any:
            raise TypeError("one of a kind")

    check_partners(Single([*range(NUM)], mixed), [3, 20])
