"""The interface between a private strategy and callbacks, and the lookup of the strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_dp.accounting import Ledger
from lightning_dp.auditing.canaries import Sum
from lightning_dp.step.facts import StateFacts
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.settings import Settings
from lightning_dp.strategies._lightning import logger_step


class PrivateStrategy(StateFacts):
    """A private strategy as callbacks see it: a type only, since callbacks know no class of strategies."""

    settings: Settings
    audits: list[str]
    accumulators: Mapping[int, Sum]
    bytes_per_step: int
    private_parameters: Callable[[], dict[str, nn.Parameter]]
    losses: Callable[[Sequence[Any], Callable[[pl.LightningModule, Any], Tensor]], list[float]]
    broadcast: Callable[[Any], Any]


def private_strategy(trainer: pl.Trainer, callback: object) -> PrivateStrategy:
    """Return the Trainer's private strategy.

    Raises:
        TypeError: the Trainer's strategy does not train privately.
    """
    strategy: Any = trainer.strategy
    if not isinstance(getattr(strategy, "mechanisms", None), Mechanisms):
        raise TypeError(
            f"Expected `Trainer(strategy=DPStrategy(...))` with {type(callback).__name__}, got "
            f"{type(strategy).__name__}. The callback reads the ledger of a private strategy: pass DPStrategy or "
            "DPDDPStrategy, or leave the callback out."
        )
    return cast(PrivateStrategy, strategy)


def ledger_holder(trainer: pl.Trainer, callback: object) -> StateFacts:
    """Return the module if it has its own ledger (``DataLens``), else the private strategy.

    Raises:
        TypeError: neither module nor strategy trains privately.
    """
    if isinstance(getattr(trainer.lightning_module, "ledger", None), Ledger):
        return cast(StateFacts, trainer.lightning_module)
    return private_strategy(trainer, callback)


def write_to_loggers(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Write values to the loggers immediately.

    ``self.log`` would write outdated values again at every step until they change.
    """
    for logger in trainer.loggers:
        logger.log_metrics(metrics=dict(values), step=logger_step(trainer))
