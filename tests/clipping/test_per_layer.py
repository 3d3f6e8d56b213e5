"""Noise that is shared out between groups: one Gaussian of the same multiplier with the least total; groups by
pattern.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_dp.clipping import FlatClipping, PerLayerClipping, make_clipping

BOUNDS, SIZES = (3.0, 0.5, 1.0), (1000, 40, 7)


def energy(shares: tuple[float, ...], sizes: tuple[int, ...] = SIZES) -> float:
    """Total noise over all coordinates, in units of (sigma sensitivity)^2."""
    return sum(size * share**2 for size, share in zip(sizes, shares, strict=True))


@pytest.mark.parametrize("sizes", [SIZES, (1, 1, 1), (5, 0, 7)])
def test_least_noise_is_one_gaussian_of_the_same_multiplier(sizes: tuple[int, ...]) -> None:
    """sum_l (R_l / sigma_l)^2 = sigma^-2, over the groups that have coordinates."""
    clipping = PerLayerClipping(max_grad_norms=BOUNDS, noise="least")
    shares = clipping.noise_shares(sizes)
    used = [(bound, share) for bound, share, size in zip(BOUNDS, shares, sizes, strict=True) if size]
    sensitivity = math.hypot(*BOUNDS)
    total = sum((bound / (share * sensitivity)) ** 2 for bound, share in used)
    assert total == pytest.approx(1.0, rel=1e-12)
    assert [share == 0 for share in shares] == [size == 0 for size in sizes]


def test_least_noise_is_the_minimum() -> None:
    """Its total is that of the formula, below any other split, and below equal noise."""
    shares = PerLayerClipping(max_grad_norms=BOUNDS, noise="least").noise_shares(SIZES)
    least = sum(bound * math.sqrt(size) for bound, size in zip(BOUNDS, SIZES, strict=True)) ** 2 / 10.25
    assert energy(shares) == pytest.approx(least, rel=1e-12)
    assert energy(shares) < 0.95 * energy((1.0, 1.0, 1.0))
    for factors in ((1.1, 1.0, 1.0), (1.0, 0.9, 1.0), (1.0, 1.0, 1.2)):
        other = [share * factor for share, factor in zip(shares, factors, strict=True)]
        scale = math.sqrt(sum((bound / share) ** 2 for bound, share in zip(BOUNDS, other, strict=True)) / 10.25)
        assert energy(tuple(share * scale for share in other)) > energy(shares)


def test_least_noise_is_equal_noise_where_bounds_follow_sizes() -> None:
    clipping = PerLayerClipping(max_grad_norms=tuple(math.sqrt(size) for size in SIZES), noise="least")
    assert clipping.noise_shares(SIZES) == pytest.approx((1.0, 1.0, 1.0), rel=1e-12)


def test_equal_noise_is_not_shared_out() -> None:
    for clipping in (PerLayerClipping(noise="equal"), FlatClipping()):
        assert clipping.noise_shares([3, 4]) == ()
        assert not clipping.shares_noise
    assert PerLayerClipping(noise="equal").scaled(2.0).noise_shares([3, 4]) == ()


def test_least_noise_is_the_default() -> None:
    for clipping in (PerLayerClipping(), PerLayerClipping().scaled(2.0), make_clipping("per_layer", 0.5)):
        assert clipping.shares_noise
        assert clipping.noise_shares([3, 4]) == PerLayerClipping(noise="least").noise_shares([3, 4]) != ()


def test_groups_follow_the_first_pattern() -> None:
    clipping = PerLayerClipping(2.0, group_weights={"encoder.*": 0.5, "head.*": 1.0, "*": 1.0})
    names = ["encoder.0.weight", "gain", "head.weight", "encoder.1.bias", "head.bias"]
    assert clipping.groups(names) == [["encoder.0.weight", "encoder.1.bias"], ["head.weight", "head.bias"], ["gain"]]
    assert clipping.sensitivity(3) == 2.0
    assert clipping._bounds(3) == pytest.approx([2 / 3, 4 / 3, 4 / 3])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"noise": "most"}, "noise"),
        ({"group_weights": {}}, "Expected patterns with weights"),
        ({"group_weights": {"a.*": 1.0}, "max_grad_norms": (1.0,)}, "Give bounds in one way"),
        ({"group_weights": {"a.*": 0.0}}, "a.*"),
    ],
)
def test_settings_out_of_range_are_refused(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PerLayerClipping(**options)


def test_patterns_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got none for 'b\.weight'"):
        PerLayerClipping(group_weights={"a.*": 1.0}).groups(["a.weight", "b.weight"])
    with pytest.raises(ValueError, match=r"got none for 'c\.\*'"):
        PerLayerClipping(group_weights={"c.*": 1.0, "*": 1.0}).groups(["a.weight"])
