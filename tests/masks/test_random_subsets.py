"""Random subsets of positions: each equally likely, of the exact size, from a generator of their own."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dp.masks import (
    random_subset,
)

FALSE_ALARM = 1e-6


def subset_p_value(draw: Callable[[int], np.ndarray], size: int, count: int, num_draws: int) -> float:
    """Chi-square test that every subset of ``count`` of ``size`` positions is equally likely."""
    seen = Counter(tuple(np.flatnonzero(draw(index))) for index in range(num_draws))
    subsets = list(itertools.combinations(range(size), count))
    assert seen.keys() <= set(subsets)
    return float(stats.chisquare([seen[subset] for subset in subsets]).pvalue)


@pytest.mark.parametrize(("size", "count"), [(7, 1), (7, 2), (7, 5), (6, 3), (9, 8)])
@pytest.mark.one_in(2)
def test_every_subset_is_equally_likely(size: int, count: int) -> None:
    """6,000 draws, at most 21 subsets, false alarms 1e-6 a case."""
    assert subset_p_value(lambda index: random_subset(size, count, (3, index)), size, count, 6000) > FALSE_ALARM


@pytest.mark.parametrize("weight", [2 / 3, 3 / 2])
def test_subset_test_rejects_a_position_of_wrong_frequency(weight: float) -> None:
    """The same 6,000 draws and the same rate of false alarms."""
    generator = np.random.default_rng(0)
    probabilities = np.array([weight, 1, 1, 1, 1, 1, 1]) / (weight + 6)

    def draw(_: int) -> np.ndarray:
        chosen = np.zeros(7, dtype=bool)
        chosen[generator.choice(7, 2, replace=False, p=probabilities)] = True
        return chosen

    assert subset_p_value(draw, 7, 2, 6000) < FALSE_ALARM


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 0), (1, 1), (10, 0), (10, 10), (100_003, 50_001), (1000, 999)])
def test_subset_has_the_exact_count(size: int, count: int) -> None:
    chosen = random_subset(size, count, (0,))
    assert chosen.shape == (size,)
    assert int(chosen.sum()) == count


def test_subset_leaves_global_generators_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    first = random_subset(100, 30, (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == legacy).all()  # type: ignore[index]  # noqa: NPY002
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert (random_subset(100, 30, (1, 2)) == first).all()
