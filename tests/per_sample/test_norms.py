"""Norms of given gradients, to float32: of long rows, of vanishing squares, and of rows that are not finite."""

from __future__ import annotations

import pytest
import torch

from lightning_dp.per_sample.rules.base import masked_squared_norm, squared_norm
from lightning_dp.per_sample.rules.outer_products import outer_squared_norm
from lightning_dp.per_sample.rules.rounding import sum_error
from tests.cases import each


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 5000, 2**20, 2**20 + 7, 2**24])
def test_squared_norm_of_equal_numbers_is_exact_to_float32(size: int) -> None:
    """One after the other, sixteen million squares of 1 / sqrt(3) add up to 0.7 % less."""
    rows = torch.full((2, size), 3**-0.5)
    rows[1] = 1e-3
    expected = torch.tensor([size / 3, size * 1e-6])
    torch.testing.assert_close(squared_norm(rows), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(squared_norm(rows.T.contiguous().T), expected, rtol=1e-5, atol=0)


def test_masked_norm_of_equal_numbers_is_exact_to_float32() -> None:
    rows = torch.full((1, 2**24), 3**-0.5)
    mask = torch.ones(2**24, dtype=torch.bool)
    torch.testing.assert_close(masked_squared_norm(rows, mask), torch.tensor([2**24 / 3]), rtol=1e-5, atol=0)


@each("size", [10, 5000, 5003])
@each("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_squared_norm_of_a_row_that_is_not_finite_is_not_finite(bad: float, size: int) -> None:
    rows = torch.ones(3, size)
    rows[1, size - 2] = bad
    assert squared_norm(rows).isfinite().tolist() == [True, False, True]


@each("small", [0.0, 1e-24, 3e-22, 1e-20])
@each("large", [1e4, 1e9, 1e18])
def test_outer_norm_is_not_below_the_true_one(small: float, large: float) -> None:
    """Squares of the one side lose their digits or vanish; the other side makes their product count."""
    a, g = torch.full((1, 5), small), torch.full((1, 3), large)
    true = float(a.double().square().sum() * g.double().square().sum()) ** 0.5
    for norm in (outer_squared_norm(a, g), outer_squared_norm(g, a)):
        assert float(norm.double().sqrt()) >= true * (1 - 1e-5) or true < 1e-15


def test_sum_error_stays_below_the_accuracy_of_norms() -> None:
    errors = [2 * sum_error(num, torch.float32) for num in (1, 3, 10, 76, 77, 10_000)]
    assert errors == sorted(errors)
    assert errors[0] >= 4 * torch.finfo(torch.float32).eps
    assert errors[-1] <= 1e-5
