"""Calls of torch that a mode which is there anyway tells a listener."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.owners.own_losses import OwnLosses
from lightning_dp.per_sample.owners.telling import telling
from lightning_dp.per_sample.tracking.tracker import Tracker
from lightning_dp.per_sample.tracking.uses import Recorder


def heard() -> list[str]:
    """Names of what a listener hears of some calls, but for the sizes they ask for."""
    names: list[str] = []

    def hear(func: Any, args: Any, kwargs: Any) -> None:
        names.append(func.__name__)

    with telling(hear):
        x = torch.ones(4, 3).abs()
        loss = F.cross_entropy(x, torch.zeros(4, dtype=torch.int64), reduction="sum")
        assert x.dim() == 2
        assert x.shape == (4, 3)
        loss.mul(2).sum()
    torch.ones(2).exp()
    return [name for name in names if name not in ("dim", "__get__")]


def follower() -> Follower:
    return Follower(Tracker(Recorder(), materialise=False, workspace=None), 4, [])


def test_a_mode_tells_of_the_calls_that_another_would_hear() -> None:
    alone = heard()
    assert alone == ["ones", "abs", "zeros", "cross_entropy", "mul", "sum"]
    with follower():
        assert heard() == alone  # not of the calls into which it takes cross_entropy apart
    with follower(), OwnLosses(4, "sum", []):
        assert heard() == alone


def test_a_listener_within_another_hears_alone() -> None:
    names: list[str] = []

    def hear(func: Any, args: Any, kwargs: Any) -> None:
        names.append(func.__name__)

    with follower(), telling(hear):
        heard()
        torch.ones(2)
    assert names == ["ones", "exp", "ones"]
