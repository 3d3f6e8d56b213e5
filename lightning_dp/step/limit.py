"""The limit on the logical steps of a run: none, or the number of steps within a budget of epsilon."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.accounting import max_steps_within

if TYPE_CHECKING:
    from lightning_dp.step.facts import StateFacts

#: Largest number of steps of look-ahead in an unbounded run.
HORIZON = 10_000_000


class Limit:
    """A limit on the logical steps of a run. This base class has none and means "off".

    **Guarantee**: the limit is a function of the public plan and the ledger.
    """

    def last_step(self, run: StateFacts) -> float:
        """Return the total number of logical steps, past steps included, after which the run must end."""
        return math.inf


class EpsilonLimit(Limit):
    """A limit on the steps of a run, so that epsilon stays within a budget.

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
    def last_step(self, run: StateFacts) -> float:
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
