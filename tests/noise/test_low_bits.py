"""What the last bits of a noisy number say about the number under the noise (Mironov 2012).

A float's last bits are finer the closer it is to zero. Noise near -1 has no bits below 2^-24 (float32) or 2^-53
(float64), so 1 + noise has none either, however close to zero it comes; 0 + noise has. Neighbours then differ in a bit
that no noise covers. On a public grid, both end at the same bit.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dp.noise import GaussianNoise
from tests.cases import each

SAMPLES, WINDOW = 200_000, 2.0**-4
FALSE_ALARM, CERTAIN = 1e-7, 1e-30
DTYPES = [torch.float32, torch.float64]


def lowest_bits(noise: GaussianNoise, value: float, dtype: torch.dtype, std: float = 1.0) -> np.ndarray:
    """For each noisy number within WINDOW of zero: the exponent of the lowest bit that is set."""
    noisy = noise.add_(torch.full((SAMPLES,), value, dtype=dtype), std).double().numpy()
    near = noisy[(np.abs(noisy) < WINDOW) & (noisy != 0)]
    mantissa, exponent = np.frexp(near)
    whole = (mantissa * 2.0**53).astype(np.int64)
    lowest = np.log2((whole & -whole).astype(np.float64)).astype(np.int64)
    return exponent - 53 + lowest


def p_value(first: np.ndarray, second: np.ndarray) -> float:
    """Chi-square test of homogeneity of two samples of small integers; rare ones are pooled."""
    low = min(first.min(), second.min())
    counts = np.stack([np.bincount(sample - low, minlength=128) for sample in (first, second)])
    common = counts.sum(0) >= 50
    table = np.column_stack([counts[:, common], counts[:, ~common].sum(1)])
    table = table[:, table.sum(0) > 0]
    return 1.0 if table.shape[1] < 2 else float(stats.chi2_contingency(table).pvalue)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_generators_low_bits_tell_neighbours_apart(dtype: torch.dtype) -> None:
    """About 6,000 numbers in the window for 1 + noise; a chance agreement of 1e-30 could not go unseen."""
    bits = [lowest_bits(GaussianNoise(), value, dtype) for value in (0.0, 1.0)]
    assert p_value(*bits) < CERTAIN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1.0, 0.7300000190734863, -2.0 / 3])
def test_the_secure_generators_low_bits_do_not(dtype: torch.dtype, value: float) -> None:
    """False-alarm rate 1e-7 a case; the same test sees the default generator with certainty (above)."""
    bits = [lowest_bits(GaussianNoise(secure=True), each, dtype) for each in (0.0, value)]
    assert p_value(*bits) > FALSE_ALARM


@each("dtype", DTYPES)
@each("std", [1.0, 0.013, 1.999, 2.0, 700.0, 1e-30])
def test_every_secure_value_is_on_the_public_grid(dtype: torch.dtype, std: float) -> None:
    """Between 2^-21 std and 2^-20 std apart, whatever was in the buffer, small and large."""
    grid = 2.0 ** (math.floor(math.log2(std)) - 20)
    assert 2**-21 * std < grid <= 2**-20 * std
    buffer = (torch.randn(10_000, dtype=torch.float64) * torch.logspace(-8, 8, 10_000) * std).to(dtype)
    noisy = GaussianNoise(secure=True).add_(buffer, std).double()
    steps = noisy / grid
    assert torch.equal(steps, steps.round())
    assert steps.abs().min() < 2**21
    assert bool((steps.long() % 2 == 1).any())  # no coarser grid either: its own noise would be larger


def test_values_that_no_grid_can_hold_are_left_to_float64() -> None:
    noisy = GaussianNoise(secure=True).add_(torch.tensor([1e300, math.inf, math.nan], dtype=torch.float64), 1e-300)
    assert noisy[0] == 1e300
    assert noisy[1] == math.inf
    assert bool(noisy[2].isnan())
