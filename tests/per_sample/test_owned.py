"""Owners of rows: what is known of them, and the layout of unequal numbers of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_dp.per_sample.owners.owned import NOBODY, OwnedAxis, Rows, arrangement, laid_out


@pytest.mark.parametrize(
    ("owners", "sole", "has_nobody"),
    [
        ([2, 2], 2, False),
        ([2, NOBODY, 2], 2, True),
        ([1, NOBODY, 2], None, True),
        ([0, 1], None, False),
        ([NOBODY, NOBODY], None, True),
        ([], None, False),
    ],
)
def test_rows_know_their_only_owner_and_unowned_entries(owners: list[int], sole: int | None, has_nobody: bool) -> None:
    rows = Rows(0, torch.tensor(owners, dtype=torch.int64))
    assert (rows.sole, rows.has_nobody) == (sole, has_nobody)


@pytest.mark.parametrize(
    "owners", [[0, 0, 1, 2, 2, 2], [2, 0, 1, 0, 2, 2], [0, 0, 1, 1, 2, 2], [0, 1, 2], [2, 2], []], ids=str
)
def test_rows_are_laid_out_by_sample_in_their_order(owners: list[int]) -> None:
    index = torch.tensor(owners, dtype=torch.int64)
    rows = torch.arange(1.0, len(owners) + 1)[:, None] * torch.tensor([1.0, 10.0])
    made, most = laid_out([rows], arrangement([OwnedAxis(0, index)], 3))
    assert most == max(1, *(owners.count(sample) for sample in range(3)))
    expected: list[Tensor] = []
    for sample in range(3):
        mine = rows[index == sample]
        expected.append(torch.cat([mine, mine.new_zeros(most - len(mine), 2)]))
    torch.testing.assert_close(made, torch.cat(expected), rtol=0, atol=0)


@pytest.mark.parametrize("owners", [[NOBODY, 0], [0, 2], [NOBODY, 0, 1], [2, 0, 1]], ids=str)
def test_rows_of_no_sample_are_not_laid_out(owners: list[int]) -> None:
    axis = OwnedAxis(0, torch.tensor(owners))
    with pytest.raises(IndexError, match="out of bounds"):
        laid_out([torch.ones(len(owners), 1)], arrangement([axis], 2))
