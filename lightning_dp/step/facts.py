"""StateFacts: the public facts of a private run, whichever object owns its PrivacyState."""

from __future__ import annotations

from typing import Any

from lightning_dp.accounting import Accountant, Ledger
from lightning_dp.reporting.notes import RunNotes
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.state import PrivacyState


class StateFacts:
    """Ledger, epsilon and statement of a private run; a base class of strategies, loops and DataLens."""

    state: PrivacyState
    mechanisms: Mechanisms

    @property
    def plan(self) -> Any:
        """The public settings of the run."""
        raise NotImplementedError

    @property
    def ledger(self) -> Ledger:
        """The ledger: all releases so far."""
        return self.state.ledger

    @property
    def accountant(self) -> Accountant:
        """The accountant, which computes epsilon from the ledger."""
        return self.state.accountant

    @property
    def notes(self) -> RunNotes:
        """Facts of the run for the privacy card, in addition to plan and ledger."""
        return self.state.notes

    @property
    def steps_taken(self) -> int:
        """Number of logical steps of this run that have released noise; schedules are functions of it."""
        return self.state.steps_taken

    @property
    def last_allowed_step(self) -> float:
        """Number of steps of the run that a budget allows; infinite without a budget."""
        return self.state.last_allowed_step

    def settle_limit(self) -> float:
        """Compute and return ``last_allowed_step`` from ``mechanisms.limit``, the plan and the current ledger."""
        self.state.last_allowed_step = self.mechanisms.limit.last_step(self)
        return self.state.last_allowed_step

    def epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon spent so far. It is public, because it depends on public settings only.

        Args:
            delta: in (0, 1); default: the plan's.

        Raises:
            ValueError: no steps recorded, which is not the same as epsilon 0.
        """
        if self.ledger.num_steps and delta is None:
            delta = self.plan.delta
        return self.state.epsilon(delta)

    def privacy_statement(self) -> str:
        """Return the privacy statement: epsilon and delta, relation, sampling, accountant, and what is not covered."""
        _ = self.plan
        return self.state.privacy_statement()
