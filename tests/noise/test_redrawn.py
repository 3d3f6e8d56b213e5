"""Draws of correlated noise: their covariance, that nothing is kept, and that no history is used twice."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dp.noise import redrawn
from lightning_dp.noise.correlated import CorrelatedNoise
from lightning_dp.noise.redrawn import CorrelatedGaussianNoise
from lightning_dp.noise.sources import normal_stream
from tests.helpers import Largest
from tests.noise.test_correlated import toeplitz

DECAY = CorrelatedNoise(decay=0.9)
BANDS = CorrelatedNoise(bands=4)
INDEPENDENT = CorrelatedNoise(decay=0.0)


def draws(
    settings: CorrelatedNoise,
    steps: int,
    size: int,
    *,
    std: float = 1.0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> torch.Tensor:
    """The noise of a whole history, of shape (steps, size)."""
    noise = CorrelatedGaussianNoise(settings, steps=steps, **options)
    return torch.stack([noise.fill_(torch.full((size,), torch.nan, dtype=dtype), std) for _ in range(steps)])


def small_slices(patch: pytest.MonkeyPatch) -> None:
    """Several slices, chunks and threads with small buffers."""
    patch.setattr(redrawn, "_SMALLEST_SLICE", 100)
    patch.setattr(redrawn, "_CPU_CHUNK", 64)
    patch.setattr(redrawn, "DEVICE_CHUNK", 128)


def on_device_path(patch: pytest.MonkeyPatch) -> None:
    """Draw as on an accelerator, from the device's own generator."""
    small_slices(patch)
    patch.setattr(CorrelatedGaussianNoise, "_add_cpu", CorrelatedGaussianNoise._add_device)


PATHS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "one slice": lambda patch: None,
    "slices": small_slices,
    "device": on_device_path,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("settings", [DECAY, BANDS], ids=str)
def test_streaming_equals_the_dense_product(
    settings: CorrelatedNoise, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V = C^-1 Z, where Z is what the same key gives without correlation."""
    PATHS[path](monkeypatch)
    independent = draws(INDEPENDENT, 9, 1003, std=2.0, seed=4)
    dense = torch.from_numpy(toeplitz(settings.inverse, 9)) @ independent
    streamed = draws(settings, 9, 1003, std=2.0, seed=4)
    assert torch.allclose(streamed, dense, rtol=0, atol=1e-13)
    assert not torch.allclose(streamed, independent, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_decay_equals_independent_noise_bit_for_bit(dtype: torch.dtype) -> None:
    found = draws(INDEPENDENT, 4, 500, std=1.7, dtype=dtype, seed=6)
    assert torch.equal(found, draws(CorrelatedNoise(bands=1), 4, 500, std=1.7, dtype=dtype, seed=6))
    for step, row in enumerate(found):
        expected = torch.empty(500, dtype=dtype)
        normal_stream(np.random.SeedSequence(6, spawn_key=(step, 0)))(expected, 1.7)
        assert torch.equal(row, expected)


def covariance_is_right(values: torch.Tensor, settings: CorrelatedNoise, std: float) -> bool:
    """Whiten with the claimed C: chi-square of all values (2e-8), and every covariance of two steps below 6 sigma
    (1e-7).
    """
    steps, size = values.shape
    white = torch.from_numpy(toeplitz(settings.coefficients(steps), steps)) @ values.double() / std
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], df=white.numel())
    between = (white @ white.T / size)[np.triu_indices(steps, 1)]
    return bool(low < white.square().sum() < high) and float(between.abs().max()) < 6 / math.sqrt(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("settings", [DECAY, BANDS, INDEPENDENT], ids=str)
def test_covariance_is_that_of_the_inverse(settings: CorrelatedNoise, dtype: torch.dtype) -> None:
    """8 steps of 40,000 coordinates: covariance std^2 C^-1 C^-T between steps."""
    values = draws(settings, 8, 40_000, std=0.7, dtype=dtype)
    assert covariance_is_right(values, settings, 0.7)
    for wrong in (2 / 3, 3 / 2):
        assert not covariance_is_right(values, settings, 0.7 * wrong)
    assert not covariance_is_right(values, CorrelatedNoise(decay=0.85), 0.7)
    assert not covariance_is_right(values[:, :20_000] + values[:, 20_000:], settings, 0.7)


def stds_are_right(values: torch.Tensor, std: float) -> bool:
    """Chi-square of each column's variance over its rows; false-alarm rate 2e-8 a column."""
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], df=len(values))
    statistic = (values / std).square().sum(0)
    return bool(((low < statistic) & (statistic < high)).all())


@pytest.mark.parametrize("settings", [DECAY, BANDS], ids=str)
def test_every_coordinate_has_its_std_at_every_step(settings: CorrelatedNoise) -> None:
    """400 histories of 5 steps and 20 coordinates: std times the row norm of C^-1."""
    values = torch.stack([draws(settings, 5, 20, std=3.0) for _ in range(400)])
    for step in range(5):
        std = 3.0 * settings.std_factor(step)
        assert stds_are_right(values[:, step], std)
        assert not stds_are_right(values[:, step], std * 2 / 3)
        assert not stds_are_right(values[:, step], std * 3 / 2)


def test_shares_of_ranks_add_up() -> None:
    """Two ranks, each with a history of its own and std / sqrt(2): the sum is correlated noise of std."""
    total = draws(DECAY, 6, 40_000, std=math.sqrt(0.5)) + draws(DECAY, 6, 40_000, std=math.sqrt(0.5))
    assert covariance_is_right(total, DECAY, 1.0)
    assert not covariance_is_right(total, DECAY, math.sqrt(0.5))


def test_noise_follows_the_scale_of_its_step() -> None:
    """A bound that changes scales the whole of v_t, earlier draws too."""
    steady = draws(DECAY, 3, 50, seed=2)
    noise = CorrelatedGaussianNoise(DECAY, steps=3, seed=2)
    for row, std in zip(steady, (1.0, 0.25, 3.0), strict=True):
        assert torch.allclose(noise.fill_(torch.empty(50, dtype=torch.float64), std), std * row, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_to_add_is_to_fill_and_to_sum(dtype: torch.dtype) -> None:
    filled = draws(BANDS, 3, 2000, std=1.5, dtype=dtype, seed=1)
    noise = CorrelatedGaussianNoise(BANDS, steps=3, seed=1)
    for row in filled:
        assert torch.equal(noise.add_(torch.zeros(2000, dtype=dtype), 1.5), row)
    noise, base = CorrelatedGaussianNoise(BANDS, steps=3, seed=1), torch.linspace(-50, 50, 2000, dtype=dtype)
    tensor = base.reshape(40, 50).clone()
    assert noise.add_(tensor, 1.5) is tensor
    assert torch.allclose(tensor.view(-1) - base, filled[0], rtol=0, atol=1e-4)


def test_results_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    small_slices(monkeypatch)
    results = []
    for threads in (1, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(draws(DECAY, 4, 1009, seed=5))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert results[0].unique().numel() == results[0].numel()


def test_nothing_of_the_buffers_size_is_kept_or_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    noise, buffer = CorrelatedGaussianNoise(BANDS, steps=6), torch.empty(1 << 19)
    for _ in range(5):
        noise.fill_(buffer, 1.0)
    with Largest() as largest:
        noise.fill_(buffer, 1.0)
    assert 0 < largest.elements <= 1 << 15
    assert not [value for value in vars(noise).values() if isinstance(value, (torch.Tensor, np.ndarray, list, dict))]


def test_global_seeds_do_not_predict_noise() -> None:
    results = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        results.append(draws(DECAY, 2, 64))
    assert not bool((results[0] == results[1]).any())


def test_global_generators_are_not_used_up() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws(DECAY, 2, 64)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_noise_is_drawn_again_exactly() -> None:
    def on_cuda(settings: CorrelatedNoise) -> torch.Tensor:
        noise = CorrelatedGaussianNoise(settings, steps=6, seed=3)
        return torch.stack([noise.fill_(torch.empty(40_000, device="cuda"), 2.0).cpu() for _ in range(6)]).double()

    values, independent = on_cuda(DECAY), on_cuda(INDEPENDENT)
    dense = torch.from_numpy(toeplitz(DECAY.inverse, 6)) @ independent
    assert torch.allclose(values, dense, rtol=0, atol=1e-5)
    assert covariance_is_right(values, DECAY, 2.0)
    assert not covariance_is_right(values, DECAY, 3.0)
