"""Masks: how many coordinates, which ones, when they change, and that everyone draws the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lightning_dp.masks import (
    GradientMask,
    MagnitudeMask,
    RandomMask,
    magnitude_masks,
    prunable_names,
)
from tests.cases import each

FALSE_ALARM = 1e-6


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def masked_counts(mask: GradientMask, step: int, parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    live = mask.live(step, parameters)
    return {name: int((~live[name]).sum()) if name in live else 0 for name in parameters}


def flat_mask(mask: GradientMask, step: int, parameters: dict[str, nn.Parameter]) -> Tensor:
    live = mask.live(step, parameters)
    return torch.cat([live.get(n, torch.ones_like(p, dtype=torch.bool)).flatten() for n, p in parameters.items()])


def random_mask(final_rate: float = 0.5, **options: Any) -> RandomMask:
    return RandomMask(final_rate, **{"schedule": "constant", "refresh_steps": 1, "num_refreshes": 10, **options})


# ---------------------------------------------------------------- random masks


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_random_mask_leaves_out_exactly_its_rate(rate: float) -> None:
    parameters = parameters_of(network())
    total = sum(p.numel() for p in parameters.values())
    mask = random_mask(rate)
    for step in range(5):
        assert sum(masked_counts(mask, step, parameters).values()) == int(rate * total)
        assert mask.realized_rate == int(rate * total) / total


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_random_mask_by_layer_leaves_out_the_rate_of_each_tensor(rate: float) -> None:
    parameters = parameters_of(network())
    mask = random_mask(rate, scope="layer")
    counts = {name: int(rate * p.numel()) for name, p in parameters.items()}
    assert masked_counts(mask, 3, parameters) == counts
    assert mask.realized_rate == sum(counts.values()) / sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.one_in(2)
def test_random_mask_reaches_every_coordinate_equally_often(scope: str) -> None:
    """3,000 refreshes, P = 40: the scaled squares of the counts are chi-square with 39 (global) or 36 (four layers)
    degrees of freedom; false alarms 1e-6, and rates off by 2/3 or 3/2 are rejected.
    """
    parameters = {str(i): nn.Parameter(torch.zeros(10)) for i in range(4)}
    mask, refreshes, rate = random_mask(0.3, scope=scope), 3000, 0.3
    counts = sum((~flat_mask(mask, step, parameters)).double() for step in range(refreshes)).reshape(4, 10)  # type: ignore[union-attr]
    group, freedom = (40, 39) if scope == "global" else (10, 36)

    def p_value(assumed: float) -> float:
        squares = ((counts - refreshes * assumed) ** 2).sum() / (refreshes * assumed * (1 - assumed))
        return float(stats.chi2(freedom).sf(float(squares) * (group - 1) / group))

    assert p_value(rate) > FALSE_ALARM
    assert p_value(rate * 2 / 3) < FALSE_ALARM
    assert p_value(rate * 3 / 2) < FALSE_ALARM


def test_random_masks_of_two_refreshes_are_independent() -> None:
    """2,000 pairs, P = 200, Z = 100: overlaps are hypergeometric with mean 50 and std 3.54; false alarms 1e-6 (4.9
    std).
    """
    parameters = {"w": nn.Parameter(torch.zeros(200))}
    mask = random_mask(0.5)
    masks = [~flat_mask(mask, step, parameters) for step in range(2001)]
    overlaps = torch.tensor([float((a & b).sum()) for a, b in itertools.pairwise(masks)])
    std = (100 * 0.5 * 0.5 * 100 / 199) ** 0.5
    assert abs(float(overlaps.mean()) - 50) < 4.9 * std / 2000**0.5
    assert float(overlaps.std()) == pytest.approx(std, rel=0.1)


def test_random_mask_layers_differ() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(50)), "b": nn.Parameter(torch.zeros(50))}
    live = random_mask(0.5, scope="layer").live(0, parameters)
    assert not torch.equal(live["a"], live["b"])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_random_mask_is_equal_on_ranks_and_after_a_resume(scope: str) -> None:
    parameters, options = parameters_of(network()), {"refresh_steps": 3, "scope": scope, "seed": 5}
    whole = [flat_mask(random_mask(**options), step, parameters) for step in range(12)]
    torch.manual_seed(77)
    one = random_mask(**options)
    for step in (11, 4, 4, 0, 7):
        assert torch.equal(flat_mask(one, step, parameters), whole[step])
    other = random_mask(**{**options, "seed": 6})
    assert not torch.equal(flat_mask(other, 4, parameters), whole[4])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", lambda progress: float(progress >= 0.5)])
@pytest.mark.parametrize("refresh_steps", [1, 3])
def test_random_mask_versions_are_equal_exactly_when_masks_are(schedule: Any, refresh_steps: int) -> None:
    parameters = {"w": nn.Parameter(torch.zeros(30, 40))}
    mask = random_mask(0.5, schedule=schedule, refresh_steps=refresh_steps, num_refreshes=5)
    drawn = [(mask.version(step), flat_mask(mask, step, parameters)) for step in range(18)]
    for (version, one), (other_version, other) in itertools.combinations(drawn, 2):
        assert (version == other_version) == torch.equal(one, other)


def test_random_mask_cools_as_published() -> None:
    """r(e, j) = r* (e F + j) / (F E - 1), clipped to [0, r*]."""
    final, epochs, per_epoch, refresh_steps = 0.9, 4, 3, 5
    mask = RandomMask(final, refresh_steps=refresh_steps, num_refreshes=epochs * per_epoch)
    for epoch, j in itertools.product(range(epochs + 2), range(per_epoch)):
        expected = min(final * (epoch * per_epoch + j) / (per_epoch * epochs - 1), final)
        for within in range(refresh_steps):
            step = (epoch * per_epoch + j) * refresh_steps + within
            assert mask.rate(step) == pytest.approx(expected, rel=1e-12)
    assert mask.rate(0) == 0.0
    assert mask.live(0, parameters_of(network())) == {}
    assert mask.rate(epochs * per_epoch * refresh_steps - 1) == final


def test_random_mask_with_one_refresh_has_the_final_rate() -> None:
    assert RandomMask(0.9, refresh_steps=7, num_refreshes=1).rate(0) == 0.9


@pytest.mark.parametrize(
    ("schedule", "middle"), [("linear", 0.4), ("cosine", 0.4), ("constant", 0.8), (lambda p: p**2, 0.2)]
)
def test_random_mask_schedules(schedule: Any, middle: float) -> None:
    mask = RandomMask(0.8, schedule=schedule, refresh_steps=2, num_refreshes=5)
    assert mask.rate(4) == pytest.approx(middle)
    assert mask.rate(8) == mask.rate(1000) == pytest.approx(0.8)
    if schedule == "cosine":
        assert mask.rate(2) == pytest.approx(0.8 * (1 - 0.5**0.5) / 2)


def test_random_mask_with_final_rate_zero_is_the_dense_control() -> None:
    mask, parameters = random_mask(0.0), parameters_of(network())
    assert mask.version(0) == mask.version(9)
    assert mask.live(9, parameters) == {}
    assert mask.realized_rate == 0.0


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_random_mask_refuses_a_schedule_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"values in \[0, 1\], got"):
        random_mask(schedule=lambda progress: value).version(0)


@each(
    "arguments, error",
    [
        ({"final_rate": 1.0}, ValueError),
        ({"final_rate": -0.1}, ValueError),
        ({"final_rate": float("nan")}, ValueError),
        ({"final_rate": "0.9"}, TypeError),
        ({"schedule": "quadratic"}, ValueError),
        ({"refresh_steps": 0}, ValueError),
        ({"num_refreshes": 0}, ValueError),
        ({"num_refreshes": 1.5}, TypeError),
        ({"scope": "channel"}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 0.5}, TypeError),
        ({"seed": True}, TypeError),
    ],
)
def test_random_mask_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        RandomMask(**{"final_rate": 0.5, "refresh_steps": 1, "num_refreshes": 1, **arguments})


def test_masks_are_what_the_step_takes() -> None:
    """Names and shapes of the parameters, booleans, their device."""
    parameters = parameters_of(network())
    masks: list[GradientMask] = [
        random_mask(0.5),
        MagnitudeMask(magnitude_masks(parameters, 0.5, "global", prunable_names(network()))),
    ]
    for mask in masks:
        live = mask.live(2, parameters)
        assert live
        for name, part in live.items():
            assert part.dtype == torch.bool
            assert part.shape == parameters[name].shape
            assert part.device == parameters[name].device
