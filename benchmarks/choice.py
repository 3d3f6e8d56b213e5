"""The best learning rate of each variant: chosen with some seeds on validation records, reported with others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.tasks import Split

CHOICE_SEEDS = (100, 101)


def best_rate(choice: dict[str, dict[str, float]]) -> float:
    """Return the rate with the best mean over the seeds of the choice; of equal ones the smallest.

    Args:
        choice: rate -> seed -> figure.
    """
    means = {float(rate): statistics.mean(by_seed.values()) for rate, by_seed in choice.items()}
    return max(sorted(means), key=lambda rate: means[rate])


def choose_and_report(
    run: Callable[[float, int, Split], Any],
    *,
    choice: Split,
    report: Split,
    grid: Sequence[float],
    seeds: int,
) -> dict[str, Any]:
    """Run the grid, then the reported seeds at its best rate.

    Args:
        run: learning rate, seed and split -> accuracy, or whatever is reported.
        choice: the split whose held-out records decide on the rate.
        report: the split that the reported runs use.
        grid: learning rates; a single one is not tried.
        seeds: how many are reported, counted from 0.

    Returns:
        ``choice`` (rate -> seed -> accuracy), ``lr`` and ``report`` (seed -> what ``run`` returned).
    """
    tried: dict[str, dict[str, float]] = {}
    if len(grid) > 1:
        tried = {f"{lr:g}": {str(seed): run(lr, seed, choice) for seed in CHOICE_SEEDS} for lr in grid}
    rate = best_rate(tried) if tried else grid[0]
    return {"choice": tried, "lr": rate, "report": {str(seed): run(rate, seed, report) for seed in range(seeds)}}
