"""Epsilon in the logger, in ``callback_metrics`` and on the progress bar."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.callbacks._strategy import ledger_holder, write_to_loggers
from lightning_dp.step.facts import StateFacts
from lightning_dp.strategies._lightning import is_saved_by_steps


class EpsilonMonitor(Callback):
    """A monitor that logs ``epsilon``, ``privacy/delta`` and ``privacy/noise_multiplier`` while training.

    ``epsilon`` is the epsilon spent so far at ``delta``, over every step the ledger holds (resumed runs and
    learning-rate searches included). It is logged every ``every_n_steps`` logical steps, at the end of each epoch (even
    a shortened one), and before each validation and each checkpoint by ``every_n_train_steps``. So the epsilon in
    ``ModelCheckpoint(filename="{epoch}-{epsilon:.2f}")`` belongs to the saved weights, and
    ``EarlyStopping(monitor="epsilon")`` works. (Checkpoints by ``train_time_interval`` use the last value logged.)

    **Guarantee**: logged values depend on public settings only, never on the data. Before the first step nothing is
    logged, because "no steps recorded" is not epsilon 0.

    Args:
        every_n_steps: logical steps between two values, >= 1.
        delta: delta of the logged epsilon, in (0, 1); default: the strategy's.
        prog_bar: True shows epsilon on the progress bar.

    Raises:
        ValueError: for arguments out of range.
        TypeError: when neither the Trainer's strategy nor its module trains privately.

    Example:
        >>> monitor = EpsilonMonitor(every_n_steps=100)
    """

    def __init__(self, *, every_n_steps: int = 50, delta: float | None = None, prog_bar: bool = True) -> None:
        self.every_n_steps = check.check_count("every_n_steps", every_n_steps)
        self.delta = None if delta is None else check.check_probability("delta", delta)
        self.prog_bar = check.check_flag("prog_bar", prog_bar)
        self._last_logged = -1

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the run is private when fit begins."""
        if stage == "fit":
            ledger_holder(trainer, self)
            self._last_logged = -1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log epsilon when a training batch ends, if it is due or a checkpoint is about to read it."""
        strategy = ledger_holder(trainer, self)
        due = self._last_logged < 0 or strategy.ledger.num_steps - self._last_logged >= self.every_n_steps
        ends = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        if due or ends or is_saved_by_steps(trainer):
            self._log(trainer, pl_module, strategy)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log epsilon when validation begins, so that checkpoint names match the weights that they hold."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._log(trainer, pl_module, ledger_holder(trainer, self))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log epsilon when an epoch ends, even if the epoch was cut short."""
        self._log(trainer, pl_module, ledger_holder(trainer, self))

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, strategy: StateFacts) -> None:
        steps = strategy.ledger.num_steps
        if steps in (0, self._last_logged):
            return
        self._last_logged = steps
        delta = strategy.plan.delta if self.delta is None else self.delta
        sigma = strategy.plan.sigma(max(0, strategy.steps_taken - 1))
        values = {"epsilon": strategy.epsilon(delta), "privacy/delta": delta, "privacy/noise_multiplier": sigma}
        for name, value in values.items():
            pl_module.log(name, value, prog_bar=self.prog_bar and name == "epsilon", logger=False, batch_size=1)
        write_to_loggers(trainer, values)
