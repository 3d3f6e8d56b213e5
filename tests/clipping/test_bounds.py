"""Rules for the clipping bound: what they learn from, and what the count costs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lightning_dp.clipping import FlatClipping, PerLayerClipping
from lightning_dp.clipping.bounds import (
    Bound,
    NoisyGradientBound,
    NoisyRelease,
    PublishedBound,
    QuantileBound,
    ScheduledBound,
)
from lightning_dp.run_length import RunLength

BASE = FlatClipping(2.0)


def release(squared_norm: float = 0.0, std: float = 0.0, statistics: tuple[float, ...] = ()) -> NoisyRelease:
    return NoisyRelease(
        squared_norm=squared_norm, num_live=10, noise_std=std, expected_batch_size=8, statistics=statistics
    )


def bound_by(schedule: Callable[[int], float]) -> ScheduledBound:
    bound = ScheduledBound(lambda length: schedule)
    bound.begin_run(RunLength(steps=10, steps_per_epoch=5))
    return bound


def test_off_is_the_bound_that_was_given() -> None:
    assert Bound().clipping(BASE, 5, 1) is BASE
    assert Bound().share_noise(1.5, 100) == (1.5, 0.0)
    assert Bound().statistics(torch.ones(4)).shape == (0,)


def test_schedule_scales_every_bound() -> None:
    rule = bound_by(lambda step: 0.5**step)
    assert rule.clipping(BASE, 3, 1).sensitivity(1) == 0.25
    per_layer = rule.clipping(PerLayerClipping(max_grad_norms=(3.0, 4.0)), 1, 2)
    assert per_layer.sensitivity(2) == 2.5


def test_schedule_refuses_a_factor_that_is_no_bound() -> None:
    with pytest.raises(ValueError, match="Expected 0 < factor < inf, got factor=0"):
        bound_by(lambda step: 0.0).clipping(BASE, 0, 1)


def test_noisy_gradient_formula() -> None:
    rule = NoisyGradientBound(3.0)
    rule.clipping(BASE, 0, 1)
    assert rule.value == 2.0
    rule.observe(release(squared_norm=100.0, std=2.0))  # 100 - 10 x 4 = 60
    assert rule.value == pytest.approx(3.0 * math.sqrt(60.0) / 8)
    assert rule.clipping(BASE, 1, 1).sensitivity(1) == pytest.approx(3.0 * math.sqrt(60.0) / 8)


def test_noisy_gradient_stays_within_its_limits() -> None:
    rule = NoisyGradientBound(1.0, minimum=0.5, maximum=3.0)
    rule.clipping(BASE, 0, 1)
    rule.observe(release(squared_norm=10.0, std=2.0))  # more noise than signal
    assert rule.value == 0.5
    rule.observe(release(squared_norm=1e9))
    assert rule.value == 3.0


def test_quantile_formula_with_centred_count_and_expected_batch() -> None:
    rule = QuantileBound(0.7, rate=0.2, count_noise=4.0)
    rule.clipping(BASE, 0, 1)
    counted = rule.statistics(torch.tensor([1.0, 2.0, 2.1, math.nan, math.inf]))
    assert counted.tolist() == [2 * 0.5 - 3 * 0.5]
    rule.observe(release(statistics=(counted.item(),)))
    assert rule.value == pytest.approx(2.0 * math.exp(-0.2 * (-0.5 / 8 + 0.5 - 0.7)))


@pytest.mark.parametrize("count_noise", [None, 4.0])
@pytest.mark.parametrize("sigma", [0.5, 1.1, 5.0])
def test_gradient_and_count_together_have_the_noise_of_the_step(sigma: float, count_noise: float | None) -> None:
    gradient_sigma, std = QuantileBound(count_noise=count_noise).share_noise(sigma, 64)
    assert gradient_sigma > sigma
    assert gradient_sigma**-2 + (0.5 / std) ** 2 == pytest.approx(sigma**-2)


def test_default_count_noise_leaves_the_gradient_its_share() -> None:
    gradient_sigma, std = QuantileBound().share_noise(9.8, 32)
    assert std == 9.8
    assert gradient_sigma == pytest.approx(9.8 * (4 / 3) ** 0.5)


def test_too_little_noise_on_the_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected 2 x count_noise > the noise multiplier 2, got count_noise=1"):
        QuantileBound(count_noise=1.0).share_noise(2.0, 64)


def test_without_noise_nothing_is_shared_out() -> None:
    assert QuantileBound().share_noise(0.0, 100) == (0.0, 5.0)


def test_quantile_converges_to_the_quantile() -> None:
    torch.manual_seed(0)
    rule = QuantileBound(0.5, rate=0.2, count_noise=1.0, minimum=1e-3, maximum=1e3)
    norms = torch.randn(1000).exp() * 5.0  # median 5
    base = FlatClipping(0.1)
    for _ in range(100):
        rule.clipping(base, 0, 1)
        statistics = (rule.statistics(norms).item(),)
        rule.observe(NoisyRelease(0.0, 10, 0.0, 1000, statistics))
    assert rule.value == pytest.approx(float(norms.median()), rel=0.05)


def test_published_bound_is_the_batch_mean_norm_and_unsound() -> None:
    rule = PublishedBound(weight=2.0)
    assert "un-noised function of the batch" in rule.unsound
    first, second = rule.statistics(torch.tensor([1.0, 3.0])), rule.statistics(torch.tensor([5.0, math.inf]))
    assert rule.rescale(tuple((first + second).tolist())) == 2.0 * 3.0
    assert rule.rescale((0.0, 0.0)) == 0.0
    assert rule.clipping(BASE, 0, 1).factors(torch.tensor([[4.0]])).item() == pytest.approx(1 / 4.01, rel=1e-5)
    assert rule.clipping(BASE, 0, 3).sensitivity(3) == 1.0


def test_state_survives_a_checkpoint() -> None:
    rule = QuantileBound()
    rule.clipping(BASE, 0, 1)
    rule.observe(release(statistics=(3.0,)))
    resumed = QuantileBound()
    resumed.load_state_dict(rule.state_dict())
    assert resumed.clipping(BASE, 1, 1).sensitivity(1) == rule.value != 2.0


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0, math.inf])
def test_a_corrupt_bound_in_a_checkpoint_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="Expected 0 < value < inf"):
        QuantileBound().load_state_dict({"value": value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoisyGradientBound(0.0), "Expected 0 < weight < inf, got weight=0"),
        (lambda: NoisyGradientBound(1.0, 2.0, 1.0), "Expected minimum <= maximum, got minimum=2"),
        (lambda: NoisyGradientBound(1.0, math.nan), "Expected 0 < minimum < inf"),
        (lambda: QuantileBound(1.0), "Expected 0 < quantile < 1"),
        (lambda: QuantileBound(rate=-1.0), "Expected 0 < rate < inf"),
        (lambda: QuantileBound(count_noise=math.inf), "Expected 0 < count_noise < inf"),
        (lambda: PublishedBound(math.nan), "Expected 0 < weight < inf"),
    ],
)
def test_bad_numbers_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
