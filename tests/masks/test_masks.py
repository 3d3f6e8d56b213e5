"""Masks: how many coordinates, which ones, when they change, and that everyone draws the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
    public_weights,
    random_subset,
)

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


@pytest.mark.parametrize(
    ("arguments", "error"),
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


# ---------------------------------------------------------------- magnitude masks


def smallest_by_sorting(flat: Sequence[float], count: int) -> set[int]:
    return set(sorted(range(len(flat)), key=lambda position: (abs(flat[position]), position))[:count])


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("amount", [0.01, 0.25, 0.5, 0.9, 0.99])
def test_magnitude_masks_remove_exactly_the_smallest(scope: str, amount: float) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: torch.randn(shape, generator=generator).round(decimals=1)
        for name, shape in {"a": (6, 7), "b": (5, 3)}.items()
    }
    masks = magnitude_masks(weights, amount, scope, ["a", "b"])
    groups = [["a", "b"]] if scope == "global" else [["a"], ["b"]]
    for names in groups:
        flat = torch.cat([weights[name].flatten() for name in names]).tolist()
        removed = torch.cat([~masks[name].flatten() for name in names])
        assert set(removed.nonzero().squeeze(1).tolist()) == smallest_by_sorting(flat, int(amount * len(flat)))
    assert {name: mask.shape for name, mask in masks.items()} == {name: w.shape for name, w in weights.items()}


def test_magnitude_masks_break_ties_by_position() -> None:
    masks = magnitude_masks({"w": torch.ones(4, 5)}, 0.35, "global", ["w"])
    assert masks["w"].flatten().tolist() == [False] * 7 + [True] * 13


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_magnitude_masks_with_random_scores_ignore_the_weights(scope: str) -> None:
    weights = {"a": torch.arange(60.0).view(6, 10), "b": torch.arange(60.0).view(6, 10)}
    masks = magnitude_masks(weights, 0.5, scope, ["a", "b"], scores="random", seed=1)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 60
    again = magnitude_masks(
        {n: -w.flip(0) for n, w in weights.items()}, 0.5, scope, ["a", "b"], scores="random", seed=1
    )
    other = magnitude_masks(weights, 0.5, scope, ["a", "b"], scores="random", seed=2)
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert not torch.equal(masks["a"], other["a"])
    assert not torch.equal(masks["a"], masks["b"])


def test_magnitude_masks_name_only_what_is_prunable() -> None:
    weights = {"w": torch.ones(4, 4), "bias": torch.zeros(4)}
    assert magnitude_masks(weights, 0.5, "global", ["w"]).keys() == {"w"}
    assert magnitude_masks(weights, 0.5, "global", []) == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amount": 0.0}, ValueError, "0 < amount < 1"),
        ({"amount": 1.0}, ValueError, "0 < amount < 1"),
        ({"amount": float("nan")}, ValueError, "0 < amount < 1"),
        ({"scope": "channel"}, ValueError, "scope to be one of"),
        ({"scores": "gradient"}, ValueError, "scores to be one of"),
        ({"seed": -1}, ValueError, "seed >= 0"),
        ({"prunable": ["w", "v"]}, ValueError, "got none for 'v'"),
        ({"weights": {"w": torch.tensor([[1.0, float("nan")]])}}, ValueError, "NaN or an infinity in 'w'"),
    ],
)
def test_magnitude_masks_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        magnitude_masks(
            **{"weights": {"w": torch.ones(2, 2)}, "amount": 0.5, "scope": "global", "prunable": ["w"], **arguments}
        )


class ScaleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))


def test_prunable_names_are_weights_outside_norm_layers() -> None:
    module = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 3),
            "conv": nn.Conv2d(2, 3, 3),
            "embedding": nn.Embedding(5, 4),
            "layer_norm": nn.LayerNorm((4, 4)),
            "rms_norm": nn.RMSNorm((4, 4)),
            "group_norm": nn.GroupNorm(2, 4),
            "batch_norm": nn.BatchNorm2d(4),
            "own_norm": ScaleNorm(),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "lstm": nn.LSTM(4, 3),
            "frozen": nn.Linear(3, 3).requires_grad_(False),
        }
    )
    module["tied"] = nn.Linear(4, 5, bias=False)
    module["tied"].weight = module["embedding"].weight
    assert prunable_names(module) == [
        "linear.weight",
        "conv.weight",
        "embedding.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
    ]
    assert set(prunable_names(module)) < dict(module.named_parameters()).keys()


def test_magnitude_mask_changes_version_exactly_when_it_changes() -> None:
    one, other = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    mask = MagnitudeMask({"w": one})
    versions = [mask.version(0)]
    for masks in ({"w": one.clone()}, {"w": other}, {"w": other, "v": one}, {}):
        mask.replace(masks)
        versions.append(mask.version(7))
    assert versions == [0, 0, 1, 2, 3]


def test_magnitude_mask_speaks_of_the_parameters_it_is_asked_for() -> None:
    mask = MagnitudeMask({"w": torch.tensor([[True, False]]), "gone": torch.tensor([[True]])})
    live = mask.live(3, {"w": nn.Parameter(torch.zeros(1, 2)), "b": nn.Parameter(torch.zeros(2))})
    assert {name: part.tolist() for name, part in live.items()} == {"w": [[True, False]]}


def test_magnitude_mask_survives_a_checkpoint(tmp_path: Any) -> None:
    """Also through ``weights_only`` loading, and in an eighth of a byte a coordinate."""
    masks = {"w": torch.from_numpy(random_subset(35, 20, (0,))).view(5, 7), "v": torch.ones(3, 3, dtype=torch.bool)}
    torch.save(MagnitudeMask(masks, 4).state_dict(), tmp_path / "mask.pt")
    state = torch.load(tmp_path / "mask.pt", weights_only=True)
    restored = MagnitudeMask.from_state_dict(state)
    assert restored.version(0) == 4
    assert restored.masks.keys() == masks.keys()
    assert all(torch.equal(restored.masks[name], mask) for name, mask in masks.items())
    assert state["masks"]["w"]["bits"].numel() == 5


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ({}, ValueError, "none for 'w'. Pass the state dict"),
        ({"state_dict": {}}, ValueError, r"Pass checkpoint\['state_dict'\]"),
        ({"w": [1.0]}, TypeError, "got list for 'w'. Scores computed from the private data are not public"),
        ({"w": torch.zeros(3, 2)}, ValueError, r"of shape \(2, 3\), got shape \(3, 2\)"),
    ],
)
def test_public_weights_must_fit(reference: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        public_weights(reference, {"w": nn.Parameter(torch.zeros(2, 3))})


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
