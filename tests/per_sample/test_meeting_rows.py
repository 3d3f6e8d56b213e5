"""Products, comparisons and counts in which rows of several samples meet are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.errors import PrivacyError
from tests.per_sample.owners import make


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


#: Functions of a square of rows, which has as many columns: all axes of a result could be those of the samples.
MEETINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "product from the left": lambda square: ones(len(square), len(square)) @ square,
    "product with itself": lambda square: torch.matmul(square, square),
    "einsum over rows": lambda square: torch.einsum("ra,rb->ab", square, square),
    "einsum without an arrow": lambda square: torch.einsum("ra,rb", square, square),
    "tensordot with itself": lambda square: torch.tensordot(square, square, ([0], [0])),
    "tensordot over rows": lambda square: torch.tensordot(square, ones(len(square), len(square)), ([0], [0])),
    "likeness along rows": lambda square: F.cosine_similarity(square, ones(*square.shape), dim=0)[:, None],
    "product along rows": lambda square: torch.linalg.vecdot(square, ones(*square.shape), dim=0)[:, None],
    "distances of columns": lambda square: F.pairwise_distance(square.T, ones(*square.shape))[:, None],
    "put by masks of others": lambda square: square.masked_scatter(square == square, square.flip(0)),
    "largest of two": lambda square: torch.max(square, square.flip(0)),
}


class Meeting(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(2, 1).double()

    def forward(self, rows: Tensor) -> Tensor:
        met = MEETINGS[self.how](rows @ ones(2, len(rows)))
        return self.layer(met.sum(1, keepdim=True).expand(-1, 2)).squeeze(1)


@pytest.mark.parametrize("how", MEETINGS)
def test_rows_that_meet_in_a_product_are_refused(how: str) -> None:
    module, generator = Meeting(how), torch.Generator().manual_seed(0)
    sets = [torch.randn(2 + i, 2, dtype=torch.float64, generator=generator) for i in range(3)]

    def batch_of(chosen: list[int]) -> dict[str, Tensor]:
        index = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(sets[i]) for i in chosen]))
        return {"rows": torch.cat([sets[i] for i in chosen]), "sample_of_row": index}

    with pytest.raises(PrivacyError, match=r"Nor can rows be followed.*meet rows of known samples"):
        make(module, lambda batch: module(batch["rows"]), batch_of)
