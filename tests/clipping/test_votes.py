"""Votes: their norm for every input, where they stand, the coins of the stochastic sign."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_dp.clipping.votes import threshold_votes, top_k_votes
from tests.cases import each

SIGNS = ["sign", "stochastic"]
AWKWARD = {
    "zero": torch.zeros(5),
    "one coordinate": torch.tensor([0.0, 0.0, -2.0, 0.0, 0.0]),
    "huge": torch.tensor([3e38, -3e38, 1.0, 2.0, 3.0]),
    "denormal": torch.tensor([1e-45, -1e-45, 0.0, 1e-44, 0.0]),
    "infinite": torch.tensor([math.inf, 1.0, 2.0, 3.0, 4.0]),
    "minus infinite": torch.tensor([-math.inf, 1.0, 2.0, 3.0, 4.0]),
    "NaN": torch.tensor([math.nan, 1.0, 2.0, 3.0, 4.0]),
    "equal": torch.ones(5),
}


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_vote_has_norm_sqrt_k(signs: str, top_k: int) -> None:
    gradients = torch.randn(7, 4, 20, generator=torch.Generator().manual_seed(0))
    votes = top_k_votes(gradients, top_k, signs=signs)
    assert votes.shape == gradients.shape
    assert set(votes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    torch.testing.assert_close(votes.norm(dim=-1), torch.full((7, 4), math.sqrt(top_k)))


@each("signs", SIGNS)
@each("name", AWKWARD)
@each("top_k", [1, 2, 5])
def test_vote_never_exceeds_sqrt_k(signs: str, name: str, top_k: int) -> None:
    votes = top_k_votes(AWKWARD[name], top_k, signs=signs)
    assert bool(votes.isfinite().all())
    assert float(votes.norm()) <= math.sqrt(top_k) + 1e-6
    if name in ("zero", "infinite", "minus infinite", "NaN"):
        assert bool((votes == 0).all())


def test_an_awkward_row_leaves_the_others_as_they_are() -> None:
    rows = torch.stack(list(AWKWARD.values()))
    together = top_k_votes(rows, 2)
    alone = torch.stack([top_k_votes(row, 2) for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("top_k", [1, 8, 9, 30, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_and_many_votes_stand_where_sorting_says(top_k: int, dtype: torch.dtype) -> None:
    """Few are found by torch, many by numpy; a row that is not finite casts none either way."""
    gradients = torch.randn(6, 64, generator=torch.Generator().manual_seed(3), dtype=dtype)
    gradients[2, 5], gradients[4, 0] = math.nan, -math.inf
    votes = top_k_votes(gradients, top_k)
    assert votes.dtype == dtype
    for row, (gradient, vote) in enumerate(zip(gradients, votes, strict=True)):
        places = gradient.abs().argsort(descending=True)[:top_k] if row not in (2, 4) else []
        expected = torch.zeros_like(gradient)
        expected[places] = gradient[places].sign()
        assert torch.equal(vote, expected)


def test_votes_stand_on_the_largest_coordinates_with_their_signs() -> None:
    gradients = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    for gradient, vote in zip(gradients, top_k_votes(gradients, 4), strict=True):
        largest = sorted(range(9), key=lambda j: -abs(float(gradient[j])))[:4]
        expected = [math.copysign(1, float(gradient[j])) if j in largest else 0.0 for j in range(9)]
        assert vote.tolist() == expected


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2])
def test_stochastic_sign_has_the_mean_of_its_definition(wrong: float) -> None:
    """E v = g / max |g|. 40,000 draws of 4 coordinates, 5 standard errors: false alarm below 3e-6; other scales are
    refused.
    """
    gradient = torch.tensor([0.5, -0.25, 1.0, 0.1])
    draws = top_k_votes(gradient.expand(40_000, 4), 4, signs="stochastic", generator=torch.Generator().manual_seed(2))
    expected = (gradient / gradient.abs().max() * wrong).clamp(-1, 1)
    error = ((1 - (gradient / gradient.abs().max()) ** 2) / 40_000).sqrt()
    close = ((draws.mean(0) - expected).abs() <= 5 * error + 1e-6).all()
    assert bool(close) == (wrong == 1.0)


def test_coins_of_rows_and_coordinates_are_independent() -> None:
    """20,000 draws of two rows with two undecided coordinates; correlations within 5 / sqrt(n), false alarm 4e-6."""
    gradient = torch.tensor([0.2, 0.3, 1.0]).expand(20_000, 2, 3)
    draws = top_k_votes(gradient, 3, signs="stochastic", generator=torch.Generator().manual_seed(4))[..., :2]
    correlations = torch.corrcoef(draws.reshape(20_000, 4).T) - torch.eye(4)
    assert float(correlations.abs().max()) < 5 / math.sqrt(20_000)


def test_low_precision_gradients_vote_in_float32() -> None:
    votes = top_k_votes(torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16), 2)
    assert votes.dtype == torch.float32
    assert votes.tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("top_k", [0, 4])
def test_k_out_of_range(top_k: int) -> None:
    with pytest.raises(ValueError, match="top_k"):
        top_k_votes(torch.ones(3), top_k)


def test_unknown_signs() -> None:
    with pytest.raises(ValueError, match="signs"):
        top_k_votes(torch.ones(3), 1, signs="Sign")


def test_threshold_keeps_what_exceeds_it() -> None:
    sums = torch.tensor([3.0, -3.0, 3.5, -3.5, 0.0, 2.0])
    assert threshold_votes(sums, 3.0).tolist() == [0.0, 0.0, 1.0, -1.0, 0.0, 0.0]
    assert threshold_votes(sums, 0.0).tolist() == [1.0, -1.0, 1.0, -1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="threshold"):
        threshold_votes(sums, math.nan)
