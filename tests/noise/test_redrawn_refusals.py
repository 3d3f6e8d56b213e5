"""Draws of correlated noise in copies, forks and pickles, and what is refused."""

from __future__ import annotations

import copy
import math
import os
import pickle
from typing import Any

import pytest
import torch

from lightning_dp.errors import PrivacyError
from lightning_dp.noise.correlated import CorrelatedNoise
from lightning_dp.noise.redrawn import CorrelatedGaussianNoise
from tests.noise.test_redrawn import DECAY, draws


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda noise: pickle.loads(pickle.dumps(noise))])
def test_copies_begin_an_empty_history_of_their_own(duplicate: Any, seed: int | None) -> None:
    noise = CorrelatedGaussianNoise(DECAY, steps=3, seed=seed)
    buffer = torch.empty(5000, dtype=torch.float64)
    first = noise.fill_(buffer.clone(), 1.0)
    twins = [duplicate(noise) for _ in range(2)]
    assert [(twin.step, twin.steps) for twin in twins] == [(0, 2)] * 2
    second = torch.stack([each.fill_(buffer.clone(), 1.0) for each in (noise, *twins)])
    correlation = torch.corrcoef(torch.cat([first[None], second]))
    # of two steps of one history: -.9 / sqrt(1.81); of others: 0, bounds of 6 / sqrt(5000)
    assert correlation[0, 1] == pytest.approx(-0.669, abs=0.085)
    assert float((correlation - torch.eye(4)).triu(1)[0, 2:].abs().max()) < 0.085
    assert float(correlation[1:, 1:].triu(1).abs().max()) < 0.085
    twins[0].fill_(buffer, 1.0)
    with pytest.raises(PrivacyError, match="2 steps of correlated noise are drawn"):
        twins[0].fill_(buffer, 1.0)


def test_a_copy_of_an_ended_run_draws_nothing() -> None:
    noise = CorrelatedGaussianNoise(DECAY, steps=1)
    noise.fill_(torch.empty(3), 1.0)
    with pytest.raises(PrivacyError, match="0 steps of correlated noise are drawn"):
        copy.copy(noise).fill_(torch.empty(3), 1.0)


def test_pickle_holds_no_key() -> None:
    one, other = CorrelatedGaussianNoise(DECAY, steps=3, seed=1), CorrelatedGaussianNoise(DECAY, steps=3, seed=2)
    assert pickle.dumps(one) == pickle.dumps(other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("seed", [None, 1])
def test_forked_child_begins_an_empty_history_of_its_own(seed: int | None) -> None:
    noise = CorrelatedGaussianNoise(DECAY, steps=2, seed=seed)
    buffer = torch.empty(4000, dtype=torch.float64)
    first = noise.fill_(buffer.clone(), 1.0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, noise.fill_(buffer, 1.0).numpy().tobytes())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        from_child = torch.frombuffer(bytearray(pipe.read()), dtype=torch.float64)
    os.waitpid(child, 0)
    assert from_child.numel() == 4000
    ours = noise.fill_(buffer, 1.0)
    correlation = torch.corrcoef(torch.stack([first, ours, from_child]))
    assert float(correlation[:2, 2].abs().max()) < 6 / math.sqrt(4000)
    assert abs(float(from_child.square().mean()) - 1.0) < 6 * math.sqrt(2 / 4000)  # not the 1.81 of a second step


def test_a_run_beyond_its_plan_is_refused() -> None:
    noise = CorrelatedGaussianNoise(DECAY, steps=2)
    for _ in range(2):
        noise.fill_(torch.empty(3), 1.0)
    tensor = torch.ones(3)
    with pytest.raises(PrivacyError, match="2 steps of correlated noise are drawn"):
        noise.add_(tensor, 1.0)
    assert torch.equal(tensor, torch.ones(3))


@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(3, dtype=torch.float64)], ids=["size", "type"])
def test_a_buffer_that_changes_is_refused(other: torch.Tensor) -> None:
    noise = CorrelatedGaussianNoise(DECAY, steps=3)
    noise.add_(torch.zeros(3), 1.0)
    with pytest.raises(PrivacyError, match="The buffer of correlated noise changed"):
        noise.add_(other, 1.0)
    assert not other.any()
    assert noise.step == 1


def test_zero_std_is_a_step_without_noise() -> None:
    noise = CorrelatedGaussianNoise(DECAY, steps=3, seed=2)
    assert torch.equal(noise.fill_(torch.ones(3, dtype=torch.float64), 0.0), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(noise.add_(torch.ones(3, dtype=torch.float64), 0.0), torch.ones(3, dtype=torch.float64))
    assert torch.equal(noise.fill_(torch.ones(3, dtype=torch.float64), 1.0), draws(DECAY, 3, 3, seed=2)[2])


@pytest.mark.parametrize(
    ("tensor", "std", "error", "message"),
    [
        (torch.zeros(3), math.nan, ValueError, "0 <= std < inf, got std=nan"),
        (torch.zeros(3), -1.0, ValueError, "0 <= std < inf"),
        (torch.zeros(3), 1e39, ValueError, r"range of torch\.float32"),
        (torch.zeros(3, dtype=torch.bfloat16), 1.0, TypeError, "dtype=torch.bfloat16"),
        (torch.zeros(4, 4).T[:, ::2], 1.0, ValueError, "contiguous"),
    ],
    ids=["nan", "negative", "range", "precision", "stride"],
)
def test_buffers_and_stds_out_of_range_are_refused(
    tensor: torch.Tensor, std: float, error: type[Exception], message: str
) -> None:
    noise = CorrelatedGaussianNoise(DECAY, steps=1)
    with pytest.raises(error, match=message):
        noise.add_(tensor, std)
    assert noise.step == 0


def test_settings_that_are_not_planned_are_refused() -> None:
    with pytest.raises(ValueError, match="Call `planned` first"):
        CorrelatedGaussianNoise(CorrelatedNoise(), steps=3)
    with pytest.raises(ValueError, match="steps >= 1"):
        CorrelatedGaussianNoise(DECAY, steps=0)
