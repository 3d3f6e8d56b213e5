"""The interface between a private strategy and callbacks, and the lookup of the strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_dp.accounting import Ledger
from lightning_dp.auditing.canaries import Sum
from lightning_dp.step.limit import Spending
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.settings import Settings
from lightning_dp.strategies._lightning import logger_step


class LedgerHolder(Spending, Protocol):
    """A run with a ledger: a private strategy, or a module that trains privately by itself (``DataLens``)."""

    mechanisms: Mechanisms
    last_allowed_step: float

    def epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon spent so far."""

    def settle_limit(self) -> float:
        """Compute and return ``last_allowed_step`` from ``mechanisms.limit``, the plan and the current ledger."""


class PrivateStrategy(LedgerHolder, Protocol):
    """A private strategy as callbacks see it."""

    settings: Settings
    audits: list[str]

    @property
    def accumulators(self) -> Mapping[int, Sum]:
        """Accumulators by index of their private optimizer, for reading only."""

    @property
    def bytes_per_step(self) -> int:
        """Bytes that one rank passes to the all-reduce of a logical step."""

    def private_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all private optimizers by qualified name."""

    def losses(self, records: Sequence[Any], loss: Callable[[pl.LightningModule, Any], Tensor]) -> list[float]:
        """Return the loss of each record alone, in evaluation mode and without side effects. NOT private."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of rank ``src`` on every rank."""


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


def ledger_holder(trainer: pl.Trainer, callback: object) -> LedgerHolder:
    """Return the module if it has its own ledger (``DataLens``), else the private strategy.

    Raises:
        TypeError: neither module nor strategy trains privately.
    """
    if isinstance(getattr(trainer.lightning_module, "ledger", None), Ledger):
        return cast(LedgerHolder, trainer.lightning_module)
    return private_strategy(trainer, callback)


def write_to_loggers(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Write values to the loggers immediately.

    ``self.log`` would write outdated values again at every step until they change.
    """
    for logger in trainer.loggers:
        logger.log_metrics(metrics=dict(values), step=logger_step(trainer))
