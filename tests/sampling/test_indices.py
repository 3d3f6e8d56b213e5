"""Private sampling: the distribution of batches and where their randomness comes from."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from lightning_dp import PrivacyError
from lightning_dp.sampling import private_dataloader
from lightning_dp.sampling.indices import PoissonBatchSampler

SAMPLINGS = ("poisson", "shuffle")


def index_batches(num_steps: int, size: int, batch_size: int, **options: Any) -> list[list[int]]:
    """Indices of the first ``num_steps`` items, over as many passes as it takes."""
    sampler: Any = private_dataloader(DataLoader(range(size), batch_size=batch_size), **options).batch_sampler
    batches: list[list[int]] = []
    while len(batches) < num_steps:
        batches.extend(sampler)
    return batches[:num_steps]


def joined(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def frequencies_are_right(batches: list[list[int]], size: int, rate: float) -> bool:
    """Chi-square of inclusion counts over all records (df = records); false-alarm rate 2e-7, two-sided.

    Too even is as wrong as too uneven: fixed-size passes are rejected as well.
    """
    counts = np.bincount(np.concatenate([np.array(batch, int) for batch in batches]), minlength=size)
    steps = len(batches)
    statistic = ((counts - steps * rate) ** 2).sum() / (steps * rate * (1 - rate))
    low, high = stats.chi2.ppf([1e-7, 1 - 1e-7], df=size)
    return bool(low < statistic < high)


def variance_is_right(sizes: np.ndarray[Any, Any], variance: float) -> bool:
    """Chi-square of the sample variance (close to normal counts); false-alarm rate about 2e-7, two-sided."""
    df = len(sizes) - 1
    low, high = stats.chi2.ppf([1e-7, 1 - 1e-7], df=df)
    return bool(low < df * sizes.var(ddof=1) / variance < high)


def test_poisson_includes_every_record_with_probability_q() -> None:
    """12,000 logical batches of 60 records at q = 0.2."""
    batches = index_batches(12_000, 60, 12)
    assert all(len(set(batch)) == len(batch) for batch in batches)
    assert frequencies_are_right(batches, 60, 0.2)
    for wrong in (2 / 3, 3 / 2):
        assert not frequencies_are_right(batches, 60, 0.2 * wrong)
    passes = [list(part) for _ in range(2_400) for part in np.random.default_rng(0).permutation(60).reshape(5, 12)]
    assert not frequencies_are_right(passes, 60, 0.2)


def test_poisson_batch_size_has_the_binomial_variance() -> None:
    """6,000 logical batches of n = 200, q = 0.1: mean 20, variance n q (1 - q) = 18."""
    sizes = np.array([len(batch) for batch in index_batches(6_000, 200, 20)])
    assert abs(sizes.mean() - 20) < 5.3 * math.sqrt(18 / 6_000)  # false-alarm rate 1e-7
    assert variance_is_right(sizes, 18)
    for wrong in (2 / 3, 3 / 2):
        assert not variance_is_right(sizes, 18 * wrong)
    assert not variance_is_right(np.full(6_000, 20), 18)


def test_poisson_pairs_of_records_are_independent() -> None:
    """P(i and j) = q^2 for all 190 pairs of 20 records, 10,000 batches; 5.9 sigma each: false-alarm rate 7e-7."""
    joined = np.zeros((10_000, 20))
    for row, batch in zip(joined, index_batches(10_000, 20, 6), strict=True):
        row[batch] = 1
    both = (joined.T @ joined)[np.triu_indices(20, 1)] / len(joined)
    expected = 0.3**2
    assert np.abs(both - expected).max() < 5.9 * math.sqrt(expected * (1 - expected) / len(joined))


def test_poisson_steps_are_independent() -> None:
    """A record in one batch says nothing of the next: lag-1 correlation, 5.3 sigma (false-alarm rate 1e-7)."""
    batches = index_batches(8_000, 10, 3)
    inside = np.array([0 in batch for batch in batches], float) - 0.3
    correlation = (inside[1:] * inside[:-1]).mean() / (0.3 * 0.7)
    assert abs(correlation) < 5.3 / math.sqrt(8_000)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.one_in(2)
def test_poisson_union_over_ranks_is_one_sample_of_all(seed: int | None) -> None:
    """3 ranks, n = 50 (not divisible), B = 2 x 3 = 6, 12,000 steps."""
    ranks = [index_batches(12_000, 50, 2, rank=rank, world_size=3, seed=seed) for rank in range(3)]
    for rank, batches in enumerate(ranks):
        assert {index for batch in batches for index in batch} == set(range(rank, 50, 3))
    union = [joined(parts) for parts in zip(*ranks, strict=True)]
    assert frequencies_are_right(union, 50, 0.12)
    assert not frequencies_are_right(union, 50, 0.12 * 2 / 3)
    assert not frequencies_are_right(union, 50, 0.12 * 3 / 2)
    variance = 50 * 0.12 * 0.88
    sizes = np.array([len(batch) for batch in union])
    assert variance_is_right(sizes, variance)
    assert not variance_is_right(sizes, variance * 2 / 3)
    assert not variance_is_right(sizes, variance * 3 / 2)


def test_ranks_are_independent_under_one_seed() -> None:
    """Correlation of batch sizes, 4,000 steps, 5.3 sigma (false-alarm rate 1e-7); one stream for both would give 1."""
    sizes = [
        [len(batch) for batch in index_batches(4_000, 100, 10, rank=rank, world_size=2, seed=3)] for rank in (0, 1)
    ]
    assert abs(np.corrcoef(sizes)[0, 1]) < 5.3 / math.sqrt(4_000)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_accumulated_parts_are_a_uniform_cut_of_a_logical_batch(sampling: str) -> None:
    """3 parts of 4,000 logical batches: each record joins each part with probability q / 3."""
    items = index_batches(12_000, 60, 4, accumulate=3, sampling=sampling)
    for start in range(0, 12_000, 3):
        logical = joined(items[start : start + 3])
        assert len(set(logical)) == len(logical)
    for part in range(3):
        counts = np.bincount(joined(items[part::3]), minlength=60)
        # 5.9 sigma for each of 180 counts: false-alarm rate 7e-7
        assert np.abs(counts - 4_000 * 0.2 / 3).max() < 5.9 * math.sqrt(4_000 * 0.2 / 3)
    sizes = np.array([len(item) for item in items])
    variance = 60 * (0.2 / 3) * (1 - 0.2 / 3)
    assert variance_is_right(sizes, variance)
    assert not variance_is_right(sizes, variance * 2 / 3)
    assert not variance_is_right(sizes, variance * 3 / 2)


def test_poisson_at_q_one_takes_all_records() -> None:
    assert [sorted(batch) for batch in index_batches(3, 7, 7)] == [list(range(7))] * 3


@pytest.mark.parametrize("world_size", [1, 3])
def test_shuffle_puts_every_record_in_one_batch_per_pass(world_size: int) -> None:
    for _ in range(5):
        passes = [
            index_batches(4, 50, 12 // world_size, sampling="shuffle", rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert sorted(index for batches in passes for batch in batches for index in batch) == list(range(50))


def test_shuffle_throws_balls_into_bins() -> None:
    """N = 100 into 5 bins, 1,000 passes: counts uniform, and sizes vary as the binomial's do (100 x 0.2 x 0.8 = 16).

    Sizes of one pass add up to n, so one bin of each pass is looked at.
    """
    batches = index_batches(5_000, 100, 20, sampling="shuffle")
    sizes = np.array([len(batch) for batch in batches[::5]])
    assert variance_is_right(sizes, 16)
    assert not variance_is_right(sizes, 16 * 2 / 3)
    assert not variance_is_right(sizes, 16 * 3 / 2)
    first = np.bincount(joined(batches[::5]), minlength=100)
    assert np.abs(first - 200).max() < 5.8 * math.sqrt(1_000 * 0.2 * 0.8)  # 100 counts: false-alarm rate 7e-7


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_new_pass_continues_the_stream(sampling: str) -> None:
    sampler: Any = private_dataloader(DataLoader(range(200), batch_size=20), sampling=sampling, seed=1).batch_sampler
    passes = [list(sampler) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    again: Any = private_dataloader(DataLoader(range(200), batch_size=20), sampling=sampling, seed=1).batch_sampler
    assert [list(again) for _ in range(3)] == passes


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_global_seeds_do_not_predict_batches(sampling: str) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        results.append(index_batches(10, 200, 20, sampling=sampling))
    assert results[0] != results[1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_draw_from_fresh_entropy(duplicate: Any) -> None:
    sampler = private_dataloader(DataLoader(range(200), batch_size=20)).batch_sampler
    twins = [duplicate(sampler) for _ in range(2)]
    first, second, third = [list(each) for each in (sampler, *twins)]
    assert first != second
    assert second != third
    assert first != third


@pytest.mark.parametrize("name", ["expected_batch_size", "dataset_size", "steps_per_epoch", "accumulate", "num_own"])
def test_what_determines_the_rate_cannot_be_changed(name: str) -> None:
    """The ledger would go on to count the rate of before."""
    sampler = PoissonBatchSampler(
        dataset_size=100, expected_batch_size=10, steps_per_epoch=10, accumulate=1, rank=0, world_size=1, seed=0
    )
    restored = pickle.loads(pickle.dumps(sampler))
    for each in (sampler, restored):
        with pytest.raises(PrivacyError, match=f"Expected {name} of the private sampler to stay.*got {name}=50 for"):
            setattr(each, name, 50)
        each.alone = True
        assert len([*each]) == 10
