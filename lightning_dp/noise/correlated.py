"""Correlated noise for data in a fixed order: coefficients, sensitivity and error, all of which are public.

The noise itself is drawn in ``redrawn.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_dp import _validate as check

_GRID = np.linspace(0.0, 5.0, 26)  # of -log10(1 - decay): the search for the best decay begins at the best of these


@dataclass(frozen=True, kw_only=True)
class CorrelatedNoise:
    """Settings of noise that partly cancels between steps: step t has ``v_t`` in place of independent ``z_t``.

        v_t = sum_{j < p} r_j z_{t-j},    z_t ~ N(0, (sigma sens(C))^2 I)
        V = C^-1 Z, where C^-1 is lower-triangular Toeplitz with the first column r

        decay=lambda (lambda-CGD): r = (1, -lambda),                        C has the first column lambda^i
        bands=p (BISR):            r = first p coefficients of (1 - x)^(1/2) = 1, -1/2, -1/8, -1/16, -5/128, ...

    SGD adds up its updates, so the noise in the weights is the sum of v so far, which grows less than the sum of z.

    **Guarantee**: one run of ``steps`` steps in which a record takes part at most ``passes`` times, at least
    ``separation`` steps apart, is ONE Gaussian mechanism of noise multiplier sigma, whatever is done with the releases.
    It covers every run that stops earlier, but no longer run. No amplification by sampling is claimed, so the order may
    be public. Clipping bounds may change between steps if ``v_t`` is scaled with them; sigma and masks may not change.

    Args:
        decay: lambda in [0, 1), or "auto" for the value of least ``loss`` over the planned run; 0 is independent noise.
            Default if ``bands`` is not given: "auto".
        bands: p >= 1, number of coefficients of C^-1 that are kept; 1 is independent noise. Excludes ``decay``.

    Raises:
        ValueError: both arguments are given, or one is out of range.
        TypeError: an argument of another type.

    Example:
        >>> noise = CorrelatedNoise(decay=0.95)
        >>> round(noise.sensitivity(1000, separation=100, passes=10), 6)
        10.18148
        >>> independent = CorrelatedNoise(decay=0.0)
        >>> round(noise.loss(1000, 100, 10), 2), round(independent.loss(1000, 100, 10), 2)
        (15.27, 70.75)

    References:
        Kalinin et al. 2026, arXiv 2601.22334 (lambda-CGD). Kalinin, McKenna, Upadhyay and Lampert 2025, arXiv
        2505.12128 (BISR).
    """

    decay: float | Literal["auto"] | None = None
    bands: int | None = None

    def __post_init__(self) -> None:
        """Validate the arguments and fill in the default."""
        if self.decay is not None and self.bands is not None:
            raise ValueError(
                f"Expected at most one of decay and bands, got decay={self.decay!r} and bands={self.bands!r}. Drop one."
            )
        if self.bands is not None:
            check.check_count("bands", self.bands)
        elif self.decay is None:
            object.__setattr__(self, "decay", "auto")
        elif self.decay != "auto":
            decay = check.check_number("decay", self.decay)
            if not 0 <= decay < 1:
                raise ValueError(f"Expected 0 <= decay < 1, got decay={self.decay!r}. 0 is independent noise.")
            object.__setattr__(self, "decay", decay)

    def planned(self, steps: int, separation: int, passes: int) -> CorrelatedNoise:
        """Return the settings for a planned run: ``decay="auto"`` is replaced by the decay of least ``loss``.

        Args:
            steps: logical steps n of the whole run, >= 1.
            separation: fewest steps b between two uses of a record, >= 1.
            passes: most uses k of a record, >= 1.
        """
        if self.decay != "auto":
            return self
        from scipy.optimize import minimize_scalar

        def loss(exponent: float) -> float:
            return replace(self, decay=1.0 - 10.0**-exponent).loss(steps, separation, passes)

        best = int(np.argmin([loss(exponent) for exponent in _GRID]))
        low, high = _GRID[max(0, best - 1)], _GRID[min(len(_GRID) - 1, best + 1)]
        found = float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x)
        return replace(self, decay=1.0 - 10.0 ** -min((found, float(_GRID[best])), key=loss))

    @property
    def inverse(self) -> tuple[float, ...]:
        """The first column of C^-1 without trailing zeros: r_0 = 1, r_1, ...

        Raises:
            ValueError: ``decay="auto"``, which must be planned first.
        """
        if self.bands is not None:
            column = [1.0]
            for j in range(1, self.bands):
                column.append(column[-1] * (j - 1.5) / j)
            return tuple(column)
        if not isinstance(self.decay, float):
            raise ValueError('Expected a decay that is a number, got decay="auto". Call `planned` first.')
        return (1.0, -self.decay) if self.decay else (1.0,)

    def coefficients(self, steps: int) -> NDArray[np.float64]:
        """Return the first column of C, of shape (steps,): the inverse of r as a power series."""
        check.check_count("steps", steps)
        from scipy.signal import lfilter

        impulse = np.zeros(steps)
        impulse[0] = 1.0
        column: NDArray[np.float64] = lfilter([1.0], self.inverse, impulse)
        return column

    def sensitivity(self, steps: int, separation: int, passes: int, restarts: Sequence[int] = ()) -> float:
        """Return the sensitivity sens(C) for contributions of norm at most 1; see ``toeplitz_sensitivity``.

        Args:
            steps: logical steps n of the whole run, >= 1.
            separation: fewest steps b between two uses of a record, >= 1.
            passes: most uses k of a record, >= 1.
            restarts: steps at which a resumed run began with an empty history.
        """
        return toeplitz_sensitivity(self.coefficients(steps), separation, passes, restarts)

    def rmse(self, steps: int) -> float:
        """Return the root mean square, over steps, of the sum of v so far, in units of the std of z.

        rmse^2 = (1/n) ||A C^-1||_F^2 = (1/n) sum_{j < n} (n - j) (r_0 + ... + r_j)^2,   A lower-triangular of ones
        """
        check.check_count("steps", steps)
        column = np.zeros(steps)
        kept = self.inverse[:steps]
        column[: len(kept)] = kept
        sums = np.cumsum(column)
        return math.sqrt(float(np.arange(steps, 0, -1) @ sums**2) / steps)

    def loss(self, steps: int, separation: int, passes: int) -> float:
        """Return ``sensitivity * rmse``, the noise in the weights at equal privacy and step size, up to a constant."""
        return self.sensitivity(steps, separation, passes) * self.rmse(steps)

    def std_factor(self, step: int) -> float:
        """Return the std of v divided by the std of z, ``step`` steps (>= 0) after a start or restart."""
        return math.sqrt(sum(r**2 for r in self.inverse[: step + 1]))


def toeplitz_sensitivity(
    coefficients: NDArray[np.float64], separation: int, passes: int, restarts: Sequence[int] = ()
) -> float:
    """Return the L2 sensitivity of ``C G`` to one record; row t of G is the sum of step t.

        max over t_1, t_2, ... of || sum_j C e_{t_j} ||_2,   at most ``passes`` of them, t_{j+1} - t_j >= separation

    C is lower-triangular Toeplitz; each restart begins a new diagonal block. For coefficients that are >= 0 and do not
    increase, the earliest and densest uses are the worst: within one block of C, the columns o, o + b, o + 2b, ... from
    the first allowed o on. Without restarts that is ``|| sum_{j<k} C e_{1+jb} ||``. With restarts, a dynamic programme
    distributes the uses over the blocks. A restart only lowers entries of C, so it never raises the result. Other
    coefficients are replaced by ``max_{i' >= i} |c_i'|``, an upper bound.

    **Guarantee**: an upper bound for contributions of norm at most 1 in any direction; exact for coefficients >= 0 that
    do not increase.

    Args:
        coefficients: first column of C, of shape (steps,).
        separation: b >= 1.
        passes: k >= 1.
        restarts: steps at which a new block begins, each in 1 ... steps - 1.

    Raises:
        ValueError: a number out of range.
        TypeError: a count that is not a whole number.
    """
    check.check_count("separation", separation)
    check.check_count("passes", passes)
    steps = len(coefficients)
    edges = [0, *sorted(set(restarts)), steps]
    if steps < 1 or not np.isfinite(coefficients).all() or (restarts and not 0 < edges[1] <= edges[-2] < steps):
        raise ValueError(
            f"Expected finite coefficients and restarts within the run, got restarts={tuple(restarts)} for {steps} "
            "steps. Pass the first column of C, and steps after the first."
        )
    if (coefficients < 0).any() or (np.diff(coefficients) > 0).any():
        coefficients = np.maximum.accumulate(np.abs(coefficients)[::-1])[::-1]

    @functools.cache
    def energies(uses: int) -> NDArray[np.float64]:
        """Return for all i the squared norm of the first i rows of the sum of ``uses`` columns 0, b, 2b, ..."""
        rows = -(-steps // separation)
        padded = np.zeros(rows * separation)
        padded[:steps] = coefficients
        sums = np.cumsum(padded.reshape(rows, separation), axis=0)
        sums[uses:] -= sums[: max(0, rows - uses)].copy()
        return np.concatenate([[0.0], np.cumsum(sums.reshape(-1)[:steps] ** 2)])

    @functools.cache
    def largest(block: int, offset: int, left: int) -> float:
        """Return the largest squared norm of ``left`` uses in the blocks from ``block`` on, after ``offset`` steps."""
        if block == len(edges) - 1:
            return 0.0
        length = edges[block + 1] - edges[block]
        most = min(left, max(0, -(-(length - offset) // separation)))
        best = 0.0
        for uses in range(most + 1) if block + 2 < len(edges) else [most]:
            here = float(energies(uses)[length - offset]) if uses else 0.0
            best = max(best, here + largest(block + 1, max(0, offset + uses * separation - length), left - uses))
        return best

    return math.sqrt(largest(0, 0, passes))
