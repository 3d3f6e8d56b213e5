"""The watch of data loading: what of a batch changes with a record, and what a second call leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_dp import PrivacyError
from lightning_dp.trials.exchanged import Exchanged
from lightning_dp.trials.loading import KeptState, LoadingWatch, check_collating

RECORDS = [torch.arange(3.0) + 10 * index for index in range(4)]


def exchanged(collate: Callable[[list[Any]], Any], records: list[Any] | None = None) -> Exchanged | None:
    return LoadingWatch().collate(collate, RECORDS if records is None else records)[1]


def joined(records: list[Any]) -> Any:
    rows = torch.cat([record[:, None].expand(3, 2) for record in records])
    return SimpleNamespace(rows=rows, owner=torch.arange(4).repeat_interleave(3))


@pytest.mark.parametrize(
    "collate",
    [
        default_collate,
        torch.stack,
        lambda records: torch.stack(records, 1),
        lambda records: {"rows": [record.numpy() for record in records]},
        lambda records: torch.stack(records) + torch.rand(4, 3),
    ],
)
def test_records_kept_apart_are_not_reported(collate: Callable[[list[Any]], Any]) -> None:
    assert exchanged(collate) is None


@pytest.mark.parametrize(
    ("collate", "found"),
    [
        (lambda records: torch.stack(records).cumsum(0), {(True,)}),
        (lambda records: {"rows": torch.stack(records), "most": torch.stack(records).amin()}, {("most", True)}),
        (lambda records: [record + records[0] for record in records], {(True,)}),
        (joined, {("rows", False)}),
        (lambda records: joined([record - records[0] for record in records]), {("rows", True)}),
    ],
)
def test_values_of_others_that_change_are_named(collate: Callable[[list[Any]], Any], found: set[Any]) -> None:
    pair = exchanged(collate)
    assert pair is not None
    assert pair.spread() == found


def test_records_of_different_shapes_are_left_alone() -> None:
    records = [torch.ones(size) for size in (1, 2, 3)]
    assert exchanged(lambda rows: torch.cat(rows).cumsum(0), records) is None


def test_calls_in_place_are_not_repeated_on_the_real_records() -> None:
    records = [{"row": row.clone()} for row in RECORDS]

    def collate(given: list[Any]) -> Tensor:
        return torch.stack([record.pop("row").sub_(1) for record in given]).cumsum(0)

    batch, pair = LoadingWatch().collate(collate, records)
    assert torch.equal(batch, (torch.stack(RECORDS) - 1).cumsum(0))
    assert pair is not None


def test_a_generator_of_its_own_reports_nothing() -> None:
    generator = np.random.default_rng(0)

    def collate(records: list[Any]) -> Tensor:
        return torch.stack(records) + torch.as_tensor(generator.normal(size=(4, 3)))

    assert exchanged(collate) is None
    assert generator.normal() == np.random.default_rng(0).normal(size=13)[-1]


NUM_CALLS = 0


def test_state_of_a_function_is_restored() -> None:
    number, seen = 0, [0]

    class Keeps:
        total = 0

        def collate(self, records: list[Any]) -> None:
            global NUM_CALLS
            nonlocal number
            self.total, number, NUM_CALLS = self.total + 1, number + 1, NUM_CALLS + 1
            seen.append(number)

    keeps = Keeps()
    keeps.collate([])
    state = KeptState(keeps.collate)
    keeps.collate([])
    assert (keeps.total, number, NUM_CALLS, seen) == (2, 2, 2, [0, 1, 2])
    state.put_back()
    assert (keeps.total, number, NUM_CALLS, seen) == (1, 1, 1, [0, 1])


class RunningMean:
    """Subtracts from a row the running mean of earlier ones, of public ones, or a number of calls."""

    def __init__(self, what: str) -> None:
        self.what, self.mean, self.calls = what, torch.zeros(3), 0

    def __call__(self, records: list[Any]) -> Any:
        rows = torch.stack(records)
        self.calls += 1
        if self.what == "too few records":
            raise RuntimeError("two at least")
        shift = self.calls if self.what == "a count" else torch.rand(3) if self.what == "draws" else self.mean
        if self.what == "earlier rows":
            self.mean = 0.9 * self.mean + 0.1 * rows.mean(0)
        return rows - shift


def test_a_collation_by_earlier_records_is_refused() -> None:
    collate = RunningMean("earlier rows")
    with pytest.raises(PrivacyError, match="collate function keeps values of earlier records"):
        check_collating(collate, collate, [torch.full((3,), float(value)) for value in range(3)])
    assert collate.calls == 0
    assert not collate.mean.any()


@pytest.mark.parametrize("what", ["public rows", "a count", "draws", "too few records"])
def test_a_collation_by_counts_and_draws_passes(what: str) -> None:
    collate = RunningMean(what)
    check_collating(collate, collate, [torch.full((3,), float(value)) for value in range(3)])
    assert collate.calls == 0
