"""How a callback finds the private strategy, or whatever else holds a ledger, that it works with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import lightning.pytorch as pl

from lightning_dp.accounting import Accountant, Ledger
from lightning_dp.strategies.base import PrivateStrategy


class PublicPlan(Protocol):
    """What may be known of a run ahead of it."""

    @property
    def delta(self) -> float:
        """The delta at which epsilon is stated."""

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None when nothing bounds it."""

    def sigma(self, step: int) -> float:
        """Noise multiplier of a step."""

    def runs(self, start: int, stop: int) -> Sequence[Any]:
        """Events of the steps ahead, as items that ``Ledger.extended`` takes."""


class LedgerHolder(Protocol):
    """A private strategy, or a module that trains privately by itself."""

    ledger: Ledger
    accountant: Accountant
    last_allowed_step: int | None

    @property
    def plan(self) -> PublicPlan:
        """The public settings of the run."""

    @property
    def steps_taken(self) -> int:
        """Steps of this run that have released noise."""

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon spent so far."""


def private_strategy(trainer: pl.Trainer, callback: object) -> PrivateStrategy:
    """The Trainer's strategy, if it trains privately.

    Raises:
        TypeError: it does not.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, PrivateStrategy):
        raise TypeError(
            f"Expected `Trainer(strategy=DPStrategy(...))` with {type(callback).__name__}, got {type(strategy).__name__}. The callback "
            "reads the ledger of a private strategy: pass DPStrategy or DPDDPStrategy, or leave the callback out."
        )
    return strategy


def ledger_holder(trainer: pl.Trainer, callback: object) -> LedgerHolder:
    """The module, if it keeps a ledger of its own (``DataLens``), else the private strategy.

    Raises:
        TypeError: there is neither.
    """
    if isinstance(getattr(trainer.lightning_module, "ledger", None), Ledger):
        return cast(LedgerHolder, trainer.lightning_module)
    return private_strategy(trainer, callback)
