"""The history of correlated noise follows the steps of a run."""

from __future__ import annotations

import pytest
import torch

from lightning_dp.clipping import FlatClipping
from lightning_dp.clipping.bounds import Bound
from lightning_dp.errors import PrivacyError
from lightning_dp.noise import CorrelatedNoise, GaussianNoise
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.correlation import Correlation
from lightning_dp.step.noising import ReleaseNoise
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.release import plan_release
from tests.step.rig import make_plan

CORRELATION = Correlation(CorrelatedNoise(decay=0.5), steps=4, separation=2, passes=2)


def draw(noise: ReleaseNoise) -> None:
    noise._drawn.fill_(torch.empty(3), 1.0)


def test_a_step_that_was_given_up_is_refused() -> None:
    """Its noise was drawn, so that the next one would cancel noise that nobody added."""
    noise = ReleaseNoise(GaussianNoise(), Reduction())
    for step in range(2):
        noise.follow(CORRELATION, step)
        assert noise.since == step
        draw(noise)
    with pytest.raises(PrivacyError, match="2 draws of correlated noise belong to 1 steps"):
        noise.follow(CORRELATION, 1)
    noise.follow(CORRELATION, 0)  # a new run begins an empty history
    assert noise.since == 0


def test_a_resumed_run_has_the_steps_that_are_left() -> None:
    noise = ReleaseNoise(GaussianNoise(), Reduction())
    for step in (2, 3):
        noise.follow(CORRELATION, step)
        draw(noise)
    with pytest.raises(PrivacyError, match="The planned 2 steps of correlated noise are drawn"):
        draw(noise)


def test_independent_noise_has_no_history() -> None:
    noise = ReleaseNoise(GaussianNoise(), Reduction())
    noise.follow(None, 7)
    draw(noise)
    assert noise.since == 0


@pytest.mark.parametrize("wrong", [1.0, 2**0.5, 0.5**0.5])
def test_correlated_shares_of_two_ranks_add_up(wrong: float) -> None:
    """Each rank draws its own stream with 1/2 of the variance: z < 5 over 3 steps of 4,000 coordinates (false alarm
    6e-7).
    """

    class Rank(Reduction):
        noise_share = 0.5**0.5

    total = torch.zeros(3, 4000, dtype=torch.float64)
    for _ in range(2):
        accumulator = Accumulator({"weight": torch.nn.Parameter(torch.zeros(4000))}, FlatClipping(1.0))
        noise, plan = ReleaseNoise(GaussianNoise(), Rank()), make_plan(FlatClipping(1.0), correlation=CORRELATION)
        for step in range(3):
            noise.follow(CORRELATION, step)
            release = plan_release(
                plan,
                step,
                clipping=accumulator.clipping,
                sizes=accumulator.group_sizes,
                bound=Bound(),
                num_releases=1,
                since=noise.since,
            )
            accumulator.reset()
            noise.begin(accumulator, release, first=step != 1, divisor=1)
            noise.add(accumulator, release)
            total[step] += accumulator.gradient / release.noise_std
    squares = (total * wrong).square()
    z = float((squares.sum(1) - 4000).abs().max()) / (2 * 4000) ** 0.5
    assert (z < 5) == (wrong == 1.0)
