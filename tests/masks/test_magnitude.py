"""Magnitude masks: they remove exactly the smallest weights, of the layers that may lose some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dp.masks import (
    MagnitudeMask,
    magnitude_masks,
    prunable_names,
    public_weights,
    random_subset,
)

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
