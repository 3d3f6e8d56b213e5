"""The history of correlated noise follows the steps of a run."""

from __future__ import annotations

import pytest
import torch

from lightning_dp.errors import PrivacyError
from lightning_dp.noise import CorrelatedNoise, GaussianNoise
from lightning_dp.step.correlation import Correlation
from lightning_dp.step.noising import ReleaseNoise
from lightning_dp.step.reduction import OneProcess

CORRELATION = Correlation(CorrelatedNoise(decay=0.5), steps=4, separation=2, passes=2)


def draw(noise: ReleaseNoise) -> None:
    noise._drawn.fill_(torch.empty(3), 1.0)


def test_a_step_that_was_given_up_is_refused() -> None:
    """Its noise was drawn, so that the next one would cancel noise that nobody added."""
    noise = ReleaseNoise(GaussianNoise(), OneProcess())
    for step in range(2):
        noise.follow(CORRELATION, step)
        assert noise.since == step
        draw(noise)
    with pytest.raises(PrivacyError, match="2 draws of correlated noise belong to 1 steps"):
        noise.follow(CORRELATION, 1)
    noise.follow(CORRELATION, 0)  # a new run begins an empty history
    assert noise.since == 0


def test_a_resumed_run_has_the_steps_that_are_left() -> None:
    noise = ReleaseNoise(GaussianNoise(), OneProcess())
    for step in (2, 3):
        noise.follow(CORRELATION, step)
        draw(noise)
    with pytest.raises(PrivacyError, match="The planned 2 steps of correlated noise are drawn"):
        draw(noise)


def test_independent_noise_has_no_history() -> None:
    noise = ReleaseNoise(GaussianNoise(), OneProcess())
    noise.follow(None, 7)
    draw(noise)
    assert noise.since == 0
