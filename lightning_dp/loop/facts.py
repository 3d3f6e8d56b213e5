"""LoopFacts: what a private loop says of itself."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_dp.accounting import Accountant, Ledger
from lightning_dp.reporting.card import RunNotes
from lightning_dp.step.plan import DPPlan
from lightning_dp.step.settings import Settings
from lightning_dp.step.state import PrivacyState


class LoopFacts:
    """Ledger, epsilon and statement of a private loop."""

    settings: Settings
    state: PrivacyState
    _losses: list[tuple[Tensor, int]]

    @property
    def plan(self) -> DPPlan:
        """The public settings of the run."""
        raise NotImplementedError

    @property
    def ledger(self) -> Ledger:
        """The ledger: what was released so far."""
        return self.state.ledger

    @property
    def accountant(self) -> Accountant:
        """The accountant: computes epsilon from the ledger."""
        return self.state.accountant

    @property
    def notes(self) -> RunNotes:
        """Facts of the run that the privacy card names in addition to plan and ledger."""
        return self.state.notes

    @property
    def steps_taken(self) -> int:
        """Logical steps of this run that have released noise."""
        return self.state.steps_taken

    @property
    def steps_left(self) -> float:
        """Logical steps until the planned end of the run or of its budget; infinite if nothing bounds it."""
        _ = self.plan
        return max(0, steps_left(self.state))

    @property
    def nonprivate_loss(self) -> float:
        """Mean loss of the last logical batch, NaN if nobody was drawn. NOT private: the statement names it once it is read."""
        self.state.nonprivate_logs.add("nonprivate_loss")
        num = sum(count for _, count in self._losses)
        mean = self.settings.loss_reduction == "mean"
        return sum(float(loss) * (count if mean else 1) for loss, count in self._losses) / num if num else math.nan

    def epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon spent so far, from the ledger; public.

        Args:
            delta: in (0, 1); default: the plan's.

        Raises:
            ValueError: no steps recorded, which is not the same as epsilon 0.
        """
        if self.ledger.num_steps and delta is None:
            delta = self.plan.delta
        return self.state.epsilon(delta)

    def privacy_statement(self) -> str:
        """Return what holds for whom: epsilon and delta, relation, sampling, accountant, and what is not covered."""
        _ = self.plan
        return self.state.privacy_statement()


def steps_left(state: PrivacyState) -> float:
    """Return how many steps the plan and the budget allow from here on; negative beyond the plan."""
    planned = math.inf if state.plan is None or state.plan.steps is None else state.plan.steps
    return min(planned, state.last_allowed_step) - state.steps_taken
