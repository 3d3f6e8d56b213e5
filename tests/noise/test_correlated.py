"""Correlated noise: coefficients, sensitivity and error against dense matrices, brute force and reference values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lightning_dp.noise.correlated import CorrelatedNoise, toeplitz_sensitivity
from tests.cases import each

Matrix = NDArray[np.float64]

SETTINGS = {
    "independent": CorrelatedNoise(decay=0.0),
    "lambda": CorrelatedNoise(decay=0.8),
    "one band": CorrelatedNoise(bands=1),
    "two bands": CorrelatedNoise(bands=2),
    "bands": CorrelatedNoise(bands=5),
    "more bands than steps": CorrelatedNoise(bands=40),
}
RUNS = [(1024, 128, 8), (1000, 100, 10), (200, 10, 20)]  # steps, separation, passes


def toeplitz(column: Any, steps: int) -> Matrix:
    """The lower-triangular Toeplitz matrix of a first column."""
    padded = np.zeros(steps)
    padded[: min(steps, len(column))] = column[:steps]
    return np.array([[padded[i - j] if i >= j else 0.0 for j in range(steps)] for i in range(steps)])


def restarted(matrix: Matrix, restarts: tuple[int, ...]) -> Matrix:
    """The matrix with a new block at each restart: entries that connect two blocks are 0."""
    block = np.searchsorted(restarts, np.arange(len(matrix)), side="right")
    return matrix * (block[:, None] == block[None, :])


def brute_force(matrix: Matrix, separation: int, passes: int) -> float:
    """The largest norm over all sets of steps that a record may take part in and all directions of its
    contributions.
    """
    gram, best = np.abs(matrix.T @ matrix), 0.0
    for count in range(1, passes + 1):
        for steps in itertools.combinations(range(len(matrix)), count):
            if all(later - earlier >= separation for earlier, later in itertools.pairwise(steps)):
                best = max(best, float(gram[np.ix_(steps, steps)].sum()))
    return math.sqrt(best)


@pytest.mark.parametrize("name", SETTINGS)
def test_coefficients_are_those_of_the_inverse(name: str) -> None:
    noise = SETTINGS[name]
    strategy, inverse = toeplitz(noise.coefficients(30), 30), toeplitz(noise.inverse, 30)
    assert np.allclose(strategy @ inverse, np.eye(30), atol=1e-13)
    assert np.allclose(inverse @ strategy, np.eye(30), atol=1e-13)


def test_bands_are_the_square_root_of_one_minus_x() -> None:
    column = CorrelatedNoise(bands=8).inverse
    assert column[:5] == (1.0, -0.5, -0.125, -0.0625, -0.0390625)
    squared = np.convolve(column, column)[:8]
    assert np.allclose(squared, [1, -1, 0, 0, 0, 0, 0, 0], atol=1e-16)


def test_decay_is_a_geometric_series() -> None:
    assert CorrelatedNoise(decay=0.5).inverse == (1.0, -0.5)
    assert CorrelatedNoise(decay=0.5).coefficients(4).tolist() == [1.0, 0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    ("noise", "steps", "separation", "passes", "expected"),
    [
        (CorrelatedNoise(decay=0.95), 1000, 100, 10, 10.181480330),
        (CorrelatedNoise(bands=4), 64, 16, 4, 2.57036331),
        (CorrelatedNoise(bands=8), 128, 16, 8, 4.26118380),
        (CorrelatedNoise(bands=8), 1024, 128, 8, 3.87345677),
    ],
    ids=str,
)
def test_sensitivity_has_the_reference_value(
    noise: CorrelatedNoise, steps: int, separation: int, passes: int, expected: float
) -> None:
    assert noise.sensitivity(steps, separation, passes) == pytest.approx(expected, abs=5.1e-9)


@pytest.mark.parametrize(
    ("run", "decay", "losses"),
    [
        (RUNS[0], 0.96, (64.03, 13.69, 25.77, 14.42)),
        (RUNS[1], 0.95, (70.75, 15.27, 28.47, 15.99)),
        (RUNS[2], 0.83, (44.83, 18.30, 19.90, 19.36)),
    ],
    ids=str,
)
def test_loss_has_the_reference_value(run: Any, decay: float, losses: tuple[float, ...]) -> None:
    kinds = [
        CorrelatedNoise(decay=0.0),
        CorrelatedNoise(decay=decay),
        CorrelatedNoise(bands=4),
        CorrelatedNoise(bands=16),
    ]
    assert [round(noise.loss(*run), 2) for noise in kinds] == list(losses)


@pytest.mark.parametrize("run", [*RUNS, (64, 64, 1), (1, 1, 1), (50, 1, 50)], ids=str)
@pytest.mark.one_in(2)
def test_auto_is_the_decay_of_least_loss(run: Any) -> None:
    """No decay of a fine grid does better, by more than the search's tolerance."""
    noise = CorrelatedNoise(decay="auto").planned(*run)
    least = min(CorrelatedNoise(decay=decay / 1000).loss(*run) for decay in range(1000))
    assert noise.loss(*run) <= least * (1 + 1e-6)
    assert noise.planned(*run) is noise


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_auto_is_near_the_reference(run: Any) -> None:
    reference = {RUNS[0]: 0.96, RUNS[1]: 0.95, RUNS[2]: 0.83}
    decay = CorrelatedNoise().planned(*run).decay
    assert isinstance(decay, float)
    assert abs(decay - reference[run]) < 0.01


@each("name", SETTINGS)
@each("steps", [1, 7, 60])
def test_rmse_is_the_norm_of_the_dense_prefix_sums(name: str, steps: int) -> None:
    dense = np.tri(steps) @ toeplitz(SETTINGS[name].inverse, steps)
    assert SETTINGS[name].rmse(steps) == pytest.approx(np.linalg.norm(dense) / math.sqrt(steps), rel=1e-13)


@each("name", SETTINGS)
@each("steps, separation, passes", [(12, 3, 4), (12, 3, 2), (11, 4, 9), (9, 1, 9), (5, 9, 2)])
def test_sensitivity_is_the_largest_over_all_sets_of_steps(name: str, steps: int, separation: int, passes: int) -> None:
    noise = SETTINGS[name]
    expected = brute_force(toeplitz(noise.coefficients(steps), steps), separation, passes)
    assert noise.sensitivity(steps, separation, passes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("restarts", [(1,), (4,), (5, 6), (2, 5, 11), (3, 6, 9)])
@pytest.mark.parametrize(("separation", "passes"), [(3, 4), (3, 2), (5, 3), (1, 12)])
@pytest.mark.one_in(4)
def test_sensitivity_after_restarts_is_the_largest(
    name: str, restarts: tuple[int, ...], separation: int, passes: int
) -> None:
    """The dynamic programme over blocks finds what trying all sets of steps on the block-diagonal matrix finds."""
    noise = SETTINGS[name]
    dense = restarted(toeplitz(noise.coefficients(12), 12), restarts)
    found = noise.sensitivity(12, separation, passes, restarts)
    assert found == pytest.approx(brute_force(dense, separation, passes), rel=1e-12)


@pytest.mark.parametrize("noise", [CorrelatedNoise(decay=0.95), CorrelatedNoise(bands=16)], ids=str)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_restarts_never_raise_the_sensitivity(noise: CorrelatedNoise, run: Any) -> None:
    whole = noise.sensitivity(*run)
    for draw in range(20):
        generator = np.random.default_rng(draw)
        restarts = tuple(generator.choice(np.arange(1, run[0]), size=1 + draw % 4, replace=False).tolist())
        assert noise.sensitivity(*run, restarts) <= whole * (1 + 1e-12)  # type: ignore[call-arg]
    assert noise.sensitivity(*run, (run[0] // 2,)) < whole  # type: ignore[call-arg]


def test_other_coefficients_get_a_bound() -> None:
    """Negative or increasing ones: their reverse cumulative maximum bounds every set of steps, with and without a
    restart.
    """
    for draw in range(20):
        column = np.random.default_rng(draw).normal(size=10)
        for restarts in ((), (4,)):
            dense = restarted(toeplitz(column, 10), restarts)
            assert toeplitz_sensitivity(column, 3, 3, restarts) >= brute_force(dense, 3, 3) * (1 - 1e-12)
    exact = np.array([3.0, 3.0, 2.0])
    assert toeplitz_sensitivity(np.array([-1.0, 3.0, -2.0]), 1, 2) == toeplitz_sensitivity(exact, 1, 2)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_record_at_the_separation_moves_by_the_sensitivity(name: str) -> None:
    """The same contribution of norm 1 at steps 0, b, 2b moves C G by sens in norm; half a separation more often, by
    more.
    """
    moved = np.zeros((24, 3))
    moved[::8] = [2 / 3, -1 / 3, 2 / 3]
    noise = SETTINGS[name]
    strategy = toeplitz(noise.coefficients(24), 24)
    assert np.linalg.norm(strategy @ moved) == pytest.approx(noise.sensitivity(24, 8, 3), rel=1e-13)
    moved[::4] = moved[0]
    assert np.linalg.norm(strategy @ moved) > noise.sensitivity(24, 8, 3)


def test_shorter_runs_are_covered_and_longer_ones_are_not() -> None:
    noise = CorrelatedNoise(decay=0.9)
    lengths = [noise.sensitivity(steps, 10, 5) for steps in (40, 49, 50)]
    assert lengths == sorted(lengths)
    assert noise.sensitivity(60, 10, 6) > lengths[-1]


def test_std_factor_is_the_row_norm_of_the_inverse() -> None:
    noise = CorrelatedNoise(bands=4)
    dense = toeplitz(noise.inverse, 7)
    assert [noise.std_factor(step) for step in range(7)] == pytest.approx(np.linalg.norm(dense, axis=1).tolist())


def test_settings_are_values() -> None:
    assert CorrelatedNoise() == CorrelatedNoise(decay="auto")
    assert CorrelatedNoise(decay=0) == CorrelatedNoise(decay=0.0)
    assert repr(CorrelatedNoise(bands=4)) == "CorrelatedNoise(decay=None, bands=4)"
    with pytest.raises(ValueError, match="Call `planned` first"):
        _ = CorrelatedNoise().inverse


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 0.5, "bands": 4}, ValueError, r"at most one of decay and bands, got decay=0.5 and bands=4"),
        ({"decay": 1.0}, ValueError, r"0 <= decay < 1, got decay=1.0"),
        ({"decay": -0.1}, ValueError, r"0 <= decay < 1"),
        ({"decay": math.nan}, ValueError, r"0 <= decay < 1, got decay=nan"),
        ({"decay": "best"}, TypeError, r"decay to be a number, got decay='best'"),
        ({"decay": True}, TypeError, r"decay to be a number"),
        ({"bands": 0}, ValueError, r"bands >= 1"),
        ({"bands": 2.0}, TypeError, r"bands to be a whole number"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CorrelatedNoise(**options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 0, 1), ValueError, r"separation >= 1"),
        ((10, 2, 0), ValueError, r"passes >= 1"),
        ((0, 2, 1), ValueError, r"steps >= 1"),
        ((10, 2.5, 1), TypeError, r"separation to be a whole number"),
        ((10, 2, 1, (0,)), ValueError, r"restarts within the run, got restarts=\(0,\) for 10 steps"),
        ((10, 2, 1, (3, 10)), ValueError, r"restarts within the run"),
    ],
    ids=str,
)
def test_runs_out_of_range_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CorrelatedNoise(decay=0.5).sensitivity(*arguments)


def test_coefficients_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite coefficients"):
        toeplitz_sensitivity(np.array([1.0, np.nan]), 1, 1)
