"""Means with standard errors, paired differences, and Markdown tables made of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

#: Standard errors at which a paired difference is called a difference.
THRESHOLD = 2.0


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error over a number of values."""

    value: float
    error: float
    count: int

    def text(self, digits: int = 3, sign: str = "") -> str:
        """Return the figure with its error."""
        return f"{self.value:{sign}.{digits}f} ± {self.error:.{digits}f}"

    def __str__(self) -> str:
        return self.text()


def mean_of(values: Iterable[float]) -> Mean:
    """Return the mean of some values; the error of a single one is NaN."""
    numbers = list(values)
    error = statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    return Mean(statistics.mean(numbers), error, len(numbers))


@dataclass(frozen=True)
class Difference:
    """A paired difference over the seeds that both sides have.

    Example:
        >>> difference({"0": 0.9, "1": 0.8, "2": 0.7}, {"0": 0.8, "1": 0.69, "2": 0.61}).verdict
        'higher'
    """

    mean: Mean

    @property
    def verdict(self) -> str:
        """Either "higher" or "lower" beyond the threshold, else "within noise"."""
        if not abs(self.mean.value) > THRESHOLD * self.mean.error:
            return "within noise"
        return "higher" if self.mean.value > 0 else "lower"

    def __str__(self) -> str:
        return self.mean.text(sign="+")


def difference(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """Return the mean of ``first - second`` over common seeds.

    Raises:
        ValueError: fewer than two common seeds.
    """
    common = sorted(first.keys() & second.keys())
    if len(common) < 2:
        raise ValueError(
            f"Expected two seeds or more that both sides have, got {common}. Run both with the same seeds."
        )
    return Difference(mean_of(first[seed] - second[seed] for seed in common))


def chance_of_false_call(count: int) -> float:
    """Return the probability that |mean| exceeds the threshold between equal sides: Student's t, ``count - 1`` degrees
    of freedom.
    """
    return float(2 * stats.t.sf(THRESHOLD, count - 1))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(str(item) for item in row) + " |" for row in rows]
    return "\n".join(lines)


def listed(names: Sequence[str]) -> str:
    """Return names as part of a sentence; "none" if there are none."""
    return ", ".join(names) if names else "none"
