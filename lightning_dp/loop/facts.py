"""LoopFacts: the public facts of a private loop."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_dp.step.facts import StateFacts
from lightning_dp.step.settings import Settings
from lightning_dp.step.state import PrivacyState


class LoopFacts(StateFacts):
    """Public facts of a private loop, and its un-noised loss, for users."""

    settings: Settings
    _losses: list[tuple[Tensor, int]]

    @property
    def steps_left(self) -> float:
        """Number of logical steps until the planned end of the run or of its budget; infinite if nothing bounds it."""
        _ = self.plan
        return max(0, steps_left(self.state))

    @property
    def nonprivate_loss(self) -> float:
        """Mean loss of the last logical batch, NaN if it was empty. NOT private: the statement names it once it is
        read.
        """
        self.state.nonprivate_logs.add("nonprivate_loss")
        num = sum(count for _, count in self._losses)
        mean = self.state.loss_reduction == "mean"
        return sum(float(loss) * (count if mean else 1) for loss, count in self._losses) / num if num else math.nan


def steps_left(state: PrivacyState) -> float:
    """Return the number of further steps that plan and budget allow; negative beyond the plan."""
    planned = math.inf if state.plan is None or state.plan.steps is None else state.plan.steps
    return min(planned, state.last_allowed_step) - state.steps_taken
