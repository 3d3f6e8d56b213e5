"""Marks by which ranks compare facts and records; test_rank_attacks.py compares real ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_dp import PrivacyError
from lightning_dp.sampling import private_dataloader
from lightning_dp.trials import ranks
from lightning_dp.trials.records import TrainingRecords

NUM = 16


class Plain:
    """An object without a text of its own."""


def test_marks_differ_with_facts_and_not_with_addresses() -> None:
    assert ranks.mark_of(["a", Plain()]) == ranks.mark_of(["a", Plain()])
    marks = {ranks.mark_of(fact) for fact in ("a", "b", b"a", ("a",), 1, 1.5, None)}
    assert len(marks) == 7
    assert all(mark == int(mark) and 0 < mark < 2**53 for mark in marks)


def rows(*, stream: bool = False, users: tuple[float, float] = (0.0, 0.0), moved: int = 0, unread: int = 0) -> Any:
    """Marks of two ranks; ``moved`` places differ, and ``unread`` others were drawn at random on one of them."""
    first = torch.arange(1.0, NUM + 1)
    second = first.clone()
    second[:moved] += 100
    second[moved : moved + unread] = 0
    heads = torch.tensor([[float(stream), users[0]], [float(stream), users[1]]])
    return torch.cat([heads, torch.stack([first, second])], 1).double()


@pytest.mark.parametrize(
    "given",
    [rows(), rows(moved=3), rows(unread=16), rows(moved=3, unread=1), rows(stream=True, moved=1), rows(users=(5, 5))],
)
def test_equal_datasets_and_streams_apart_are_accepted(given: torch.Tensor) -> None:
    ranks._check_data(given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (rows(moved=4), "got other records at 4 of 16 positions"),
        (rows(moved=3, unread=10), "got other records at 3 of 6 positions"),
        (rows(users=(5, 6)), "Expected the same users on every rank"),
        (rows(stream=True), "got the same first records on every rank"),
    ],
)
def test_other_records_users_or_equal_streams_are_refused(given: torch.Tensor, match: str) -> None:
    with pytest.raises(PrivacyError, match=match):
        ranks._check_data(given)


class Items(Dataset[Any]):
    """Paths with numbers, some of which are drawn."""

    def __init__(self, *, folder: str = "a", draws: bool = False, words: bool = False) -> None:
        self.folder, self.draws, self.words = folder, draws, words

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        path = f"{self.folder}/{index}"
        return (
            path if self.words else (path, np.float32(index + self.draws * float(torch.rand(()))), torch.tensor(index))
        )


class Endless(IterableDataset[Any]):
    """Numbers from 0 on."""

    def __iter__(self) -> Any:
        return iter(range(100))


def marks_of(dataset: Any, **options: Any) -> list[float]:
    loader = private_dataloader(DataLoader(dataset, batch_size=2), **options)
    return TrainingRecords(lambda: loader, lambda batch: batch).marks()


def test_marks_of_records_follow_their_numbers() -> None:
    plain = marks_of(Items())
    assert plain == marks_of(Items(folder="b"))  # paths may differ between machines
    assert len({*plain[2:]}) == NUM
    assert plain[:2] == [0.0, 0.0]
    assert marks_of(Items(words=True)) != marks_of(Items(words=True, folder="b"))
    assert marks_of(Items(draws=True)) == [0.0] * (NUM + 2)


def test_marks_tell_users_and_streams() -> None:
    ids = [index // 2 for index in range(40)]
    one, other = (marks_of(Items(), unit=unit, records_per_unit=2) for unit in (ids, [(each + 1) % 40 for each in ids]))
    assert one == other  # the same users under other names
    assert marks_of(Items(), unit=ids[1:] + ids[:1], records_per_unit=2)[1] not in (0.0, one[1])
    stream = marks_of(Endless(), sampling="shuffle")
    assert stream[:2] == [1.0, 0.0]
    assert len(stream) == len(one) == NUM + 2
