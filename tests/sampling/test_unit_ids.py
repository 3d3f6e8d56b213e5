"""Where the ids of users are found, and which are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_dp.sampling import private_dataloader
from lightning_dp.sampling.units import Units, unit_ids


class Rows(Dataset[Any]):
    """Items are mappings; reading one is counted."""

    def __init__(self, ids: Sequence[Any]) -> None:
        self.ids, self.num_read = list(ids), 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.num_read += 1
        return {"x": torch.rand(1), "who": self.ids[index]}


class Table(Rows):
    """Keeps columns, as tables on disk do."""

    column_names = ("x", "who")

    def __getitem__(self, index: Any) -> Any:
        return self.ids if index == "who" else super().__getitem__(index)


TENSORS = TensorDataset(torch.rand(4, 2), torch.tensor([3, 3, 8, 3]))


@pytest.mark.parametrize(
    ("dataset", "unit", "expected"),
    [
        (range(4), [3, 3, 8, 3], [3, 3, 8, 3]),
        (range(4), np.array(["a", "b", "a", "a"]), ["a", "b", "a", "a"]),
        (range(4), torch.tensor([3, 3, 8, 3]), [3, 3, 8, 3]),
        (TENSORS, 1, [3, 3, 8, 3]),
        (TENSORS, -1, [3, 3, 8, 3]),
        (Subset(TENSORS, [2, 0, 1]), 1, [8, 3, 3]),
        (ConcatDataset([TENSORS, Subset(TENSORS, [2])]), 1, [3, 3, 8, 3, 8]),
        (Table("abca"), "who", list("abca")),
        (Subset(Table("abca"), [3, 1]), "who", ["a", "b"]),
    ],
    ids=["list", "array", "tensor", "column", "last", "subset", "several", "table", "part-of-table"],
)
def test_ids_are_found_without_reading_items(dataset: Any, unit: Any, expected: list[Any]) -> None:
    assert unit_ids(dataset, len(expected), unit, warn=True) == expected
    assert getattr(dataset, "num_read", 0) == 0


def test_ids_are_read_where_no_column_holds_them() -> None:
    dataset = Rows([torch.tensor(4), torch.tensor(4), torch.tensor(9)])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="Reading all 3 records once to find their users at 'who', since Rows keeps"):
        loader = private_dataloader(DataLoader(dataset, batch_size=1), unit="who", records_per_unit=1)
    assert dataset.num_read == 6  # the first 16 items twice
    assert torch.equal(torch.get_rng_state(), before)
    assert loader.facts.dataset_size == 2
    pairs = [(1.0, "a"), (2.0, "b"), (3.0, "a")]
    with pytest.warns(UserWarning, match="users at 1, since list keeps"):
        loader = private_dataloader(DataLoader(pairs, batch_size=1), unit=1, records_per_unit=1)  # type: ignore[arg-type]
    assert loader.facts.dataset_size == 2
    # rank 0 says it for all
    private_dataloader(DataLoader(dataset, batch_size=1), unit="who", records_per_unit=1, rank=1, world_size=2)


class User:
    """Compared by identity."""


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ([User(), User(), User()], TypeError, "compared by value, got User"),
        ([(torch.tensor(1), 2)] * 3, TypeError, "compared by value, got tuple"),
        ([7, "7", 7], ValueError, "ids of one type, got int and str"),
        ([b"a", "a", "a"], ValueError, "ids of one type, got bytes and str"),
        ([1.5, 2.5, 1.5], ValueError, "ids that are exact, got 1.5"),
        (torch.tensor([2.0**24, 2.0**24 + 1, 1.0]), ValueError, "ids that are exact, got 16777216"),
    ],
)
def test_ids_that_may_join_or_split_users_are_refused(ids: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        private_dataloader(DataLoader(range(3), batch_size=1), unit=ids, records_per_unit=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ids",
    [[torch.tensor(4), torch.tensor(4), torch.tensor(9)], np.array([4.0, 4.0, 9.0]), [("a", 1), ("a", 1), ("b", 1)]],
)
def test_equal_ids_are_one_user(ids: Any) -> None:
    loader = private_dataloader(DataLoader(range(3), batch_size=1), unit=ids, records_per_unit=1)  # type: ignore[arg-type]
    assert loader.facts.dataset_size == 2


def test_ids_that_are_drawn_at_random_are_refused() -> None:
    class AtRandom(Rows):
        def __getitem__(self, index: int) -> Any:
            return {"who": float(torch.rand(()) > 0.5) + 2 * index}

    dataset = AtRandom([torch.tensor(n) for n in range(16)])
    with (
        pytest.warns(UserWarning, match="Reading all 16 records"),
        pytest.raises(ValueError, match="items that keep their user's id"),
    ):
        private_dataloader(DataLoader(dataset, batch_size=1), unit="who", records_per_unit=1)


def test_users_are_numbered_by_their_first_record() -> None:
    units = Units(["b", "a", "b", "c"], most=5)
    assert units.choose(np.array([2, 0, 1]), np.random.default_rng(0)) == ([3, 0, 2, 1], [1, 2, 1])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, None, 2], ValueError, "an id for every record, got None for record 1"),
        ([1.0, 2.0, math.nan], ValueError, "got nan for record 2"),
        ([[1], [2], [3]], TypeError, "can be hashed, got list for record 0"),
        (np.zeros((3, 2)), TypeError, "can be hashed, got list for record 0"),
        ([1, 2], ValueError, "one id per record in unit, got 2 ids for 3 records"),
    ],
    ids=["none", "nan", "lists", "matrix", "number"],
)
def test_ids_that_name_no_user_are_refused(ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        private_dataloader(DataLoader(range(3), batch_size=1), unit=ids, records_per_unit=1)


@pytest.mark.parametrize("unit", ["user", 7])
def test_items_without_the_key_are_refused(unit: Any) -> None:
    with pytest.raises(ValueError, match=f"hold their user's id at unit={unit!r}, got .* for record 0 of Rows"):
        unit_ids(Rows("abc"), 3, unit, warn=False)
    with pytest.raises(ValueError, match="got IndexError for record 0 of TensorDataset"):
        unit_ids(TENSORS, 4, 2, warn=False)
