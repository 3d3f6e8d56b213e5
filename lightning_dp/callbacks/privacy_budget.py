"""A hard limit on epsilon: training stops before the step that would exceed it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.callbacks._strategy import ledger_holder
from lightning_dp.errors import PrivacyError
from lightning_dp.step.facts import StateFacts
from lightning_dp.step.limit import EpsilonLimit


class PrivacyBudget(Callback):
    """A budget of epsilon: training stops before the step that would exceed it.

    The number of steps that fit is computed once from the public plan and the ledger: the largest N with
    ``epsilon(ledger + N planned steps, delta) <= epsilon``. After step N the Trainer is asked to stop. If it continues
    because of ``min_epochs`` or ``min_steps``, the next step raises before its noise is drawn.

    **Guarantee**: no released step makes ``strategy.epsilon(delta)`` exceed ``epsilon``, under the strategy's
    accountant. The number of steps is public; nothing depends on the data.

    Args:
        epsilon: the budget, > 0.
        delta: delta in (0, 1); default: the strategy's.

    Raises:
        ValueError: for arguments out of range.
        TypeError: when neither the Trainer's strategy nor its module trains privately.
        PrivacyError: at the start of a run whose first step would already exceed the budget.

    Example:
        >>> budget = PrivacyBudget(epsilon=3.0, delta=1e-5)
    """

    def __init__(self, epsilon: float, delta: float | None = None) -> None:
        self.epsilon = check.check_positive("epsilon", epsilon)
        self.delta = None if delta is None else check.check_probability("delta", delta)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the limit of the run when fit begins, so that the limit also holds in a learning-rate search."""
        if stage == "fit":
            limit = EpsilonLimit(self.epsilon, self.delta)
            ledger_holder(trainer, self).mechanisms.add(self, limit=limit)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the number of steps that fit when training begins; raise if no planned step fits."""
        strategy = ledger_holder(trainer, self)
        stop = strategy.plan.steps
        if strategy.settle_limit() <= strategy.steps_taken and (stop is None or strategy.steps_taken < stop):
            raise PrivacyError(
                f"Expected a budget that allows at least one step, got PrivacyBudget(epsilon={self.epsilon:g}) with "
                f"{self._spent(strategy)}. Raise the budget or the noise, or keep the model as it is."
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the Trainer when a training batch ends, if the next step would not fit."""
        strategy = ledger_holder(trainer, self)
        remaining = strategy.plan.steps is None or strategy.steps_taken < strategy.plan.steps
        if strategy.steps_taken >= strategy.last_allowed_step and remaining and not trainer.should_stop:
            trainer.should_stop = True
            rank_zero_info(
                f"PrivacyBudget: stopped after {strategy.steps_taken} steps; the next would exceed "
                f"epsilon={self.epsilon:g}."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lift the limit when a stage ends."""
        ledger_holder(trainer, self).mechanisms.remove(self)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lift the limit when a run is interrupted."""
        ledger_holder(trainer, self).mechanisms.remove(self)

    def _spent(self, strategy: StateFacts) -> str:
        if strategy.ledger.num_steps == 0:
            return "no steps recorded, so one step alone exceeds it"
        return f"epsilon={strategy.epsilon(self.delta):.4g} already spent"
