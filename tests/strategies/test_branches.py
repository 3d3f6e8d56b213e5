"""Branches that only records with missing values take are learned when a check meets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.trials.branches import Branches
from tests.helpers import Classifier, make_loader, make_trainer


class Gaps(Classifier):
    """Puts a learned vector in the place of records with missing values, in an operation of its own."""

    mixes = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.filled = nn.Parameter(torch.ones(6))

    def forward(self, features: Tensor) -> Tensor:
        missing, hidden = features.isnan().any(1, keepdim=True), self.first(features.nan_to_num()) + self.filled
        if bool(missing.any()):
            hidden = torch.where(missing, self.filled.square(), hidden)
            hidden = hidden - hidden.mean(0) if self.mixes else hidden
        return self.second(hidden)


def ways(module: Any, tmp_path: Path) -> list[tuple[str, bool]]:
    """Return the engine of a fit, and whether it followed the owners of rows."""
    seen = []

    class Seen(DPStrategy):
        def on_train_end(self) -> None:
            assert self._fit is not None
            engine = self._fit.step.engine
            seen.append((type(engine).__name__, engine.follows_owners))
            super().on_train_end()

    make_trainer(Seen(noise_multiplier=1.0), tmp_path, max_epochs=1).fit(module, make_loader())
    return seen


def test_a_branch_of_missing_values_runs_by_rules(tmp_path: Path) -> None:
    assert ways(Gaps(), tmp_path) == [("PerSampleEngine", False)]


def test_a_branch_that_mixes_records_is_refused(tmp_path: Path) -> None:
    module = Gaps()
    module.mixes = True
    with pytest.raises(PrivacyError, match=r"one that mixes them|influence each other"):
        ways(module, tmp_path)


def test_a_branch_is_learned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where learning does not help, the run goes on as it would without it."""
    asked = []
    learn = Branches.learn

    def without_effect(self: Branches, snapshot: Any, error: Any, learner: Any) -> bool:
        asked.append(learn(self, snapshot, error, lambda records: None))
        return asked[-1]

    monkeypatch.setattr(Branches, "learn", without_effect)
    assert ways(Gaps(), tmp_path) == [("PerSampleEngine", True)]
    assert asked.count(True) == 1
