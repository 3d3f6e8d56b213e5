"""The limit of logical steps of a run: none, or as many as a budget of epsilon pays for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.accounting import Accountant, Ledger, max_steps_within

#: Largest number of steps of look-ahead in an unbounded run.
HORIZON = 10_000_000


class PublicPlan(Protocol):
    """Public facts about the steps of a run."""

    @property
    def delta(self) -> float:
        """Delta at which epsilon is stated."""

    @property
    def steps(self) -> int | None:
        """Logical steps of the whole run; None if nothing bounds it."""

    def sigma(self, step: int) -> float:
        """Return the noise multiplier of a step."""

    def runs(self, start: int, stop: int) -> Sequence[Any]:
        """Return the events of planned steps, as items that ``Ledger.extended`` takes."""


class Spending(Protocol):
    """The view of a run that a budget needs: plan, ledger and the steps taken so far."""

    @property
    def ledger(self) -> Ledger:
        """All releases so far."""

    @property
    def accountant(self) -> Accountant:
        """An object that computes epsilon."""

    @property
    def plan(self) -> PublicPlan:
        """Public settings of the run."""

    @property
    def steps_taken(self) -> int:
        """Logical steps of this run that have released noise."""


class Limit:
    """A limit on the logical steps of a run. This base class has none and means "off".

    **Guarantee**: a function of the public plan and the ledger.
    """

    def last_step(self, run: Spending) -> float:
        """Return the number of logical steps at which the run must end, including those already taken."""
        return math.inf


class EpsilonLimit(Limit):
    """A limit to the steps that fit a budget.

        last_step = steps_taken + max {N : epsilon(ledger + next N planned steps, delta) <= epsilon}

    Args:
        epsilon: the budget, > 0.
        delta: delta in (0, 1); default: the plan's.

    Raises:
        ValueError: arguments out of range.
    """

    def __init__(self, epsilon: float, delta: float | None = None) -> None:
        self.epsilon = check.check_positive("epsilon", epsilon)
        self.delta = None if delta is None else check.check_probability("delta", delta)

    @override
    def last_step(self, run: Spending) -> float:
        plan, start = run.plan, run.steps_taken
        delta = plan.delta if self.delta is None else self.delta
        stop = start + HORIZON if plan.steps is None else plan.steps
        horizon = 1000
        while True:
            ahead = min(stop, start + horizon)
            if ahead <= start:
                return start
            allowed = max_steps_within(
                epsilon=self.epsilon,
                delta=delta,
                accountant=run.accountant,
                history=run.ledger,
                runs=plan.runs(start, ahead),
            )
            if allowed < ahead - start or ahead == stop:
                return start + allowed
            horizon *= 10
