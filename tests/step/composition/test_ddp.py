"""Mechanisms in two gloo processes: live coordinates only are sent, masks and bounds agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_two_ranks

P, PRUNABLE = 53, 45  # coordinates of the classifier, and its weights


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks wrote down."""
    return run_two_ranks(Path(__file__).with_name("ddp_run.py"), tmp_path_factory)


def test_the_count_rides_in_the_one_all_reduce_of_a_step(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["count"]["sent"].count(P + 1) == 5
        assert P not in seen["count"]["sent"]


def test_live_coordinates_only_are_sent(ranks: list[dict[str, Any]]) -> None:
    """Both masks together: 0.8 of all are left out, and 0.4 of the weights."""
    for seen in ranks:
        masked = seen["masked"]
        live = [int(mask.sum()) for mask in masked["live"]]
        assert len(live) == 12
        assert all(0 < count <= P - int(0.8 * P) for count in live)
        assert any(count < P - int(0.8 * P) for count in live)
        steps = [size for size in masked["sent"] if 1 < size < P]
        assert steps == live


def test_masks_bounds_and_weights_are_those_of_the_other_rank(ranks: list[dict[str, Any]]) -> None:
    one, other = (seen["masked"] for seen in ranks)
    assert all(torch.equal(a, b) for a, b in zip(one["live"], other["live"], strict=True))
    assert torch.equal(one["live"][0], one["live"][1])
    assert not torch.equal(one["live"][1], one["live"][2])
    assert one["bounds"] == other["bounds"]
    assert len(set(one["bounds"])) > 1
    assert torch.equal(one["weights"], other["weights"])
    assert ranks[0]["count"]["bounds"] == ranks[1]["count"]["bounds"]
    assert torch.equal(ranks[0]["votes"], ranks[1]["votes"])
