"""Epsilon as a torchmetrics Metric: a view on a ledger, never its owner."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dp import _validate as check
from lightning_dp.accounting import Accountant, Ledger, make_accountant


class Epsilon(Metric):
    """Epsilon spent at ``delta``, read from a ledger.

    ``compute()`` is ``accountant.epsilon(ledger, delta)``; NaN while no steps are recorded, which is not epsilon 0.

    **Guarantee**: resetting the metric, as Lightning does every epoch, never touches the ledger. The value depends on
    public settings only. It is the same on every rank, so nothing is reduced.

    Args:
        source: a private strategy (its ledger, also after a resume) or a ``Ledger``.
        delta: in (0, 1).
        accountant: "pld", "rdp", "prv" or "gdp", or an ``Accountant``; default: the strategy's, or "pld".

    As input to ``forward`` and ``update`` the metric accepts anything and ignores it.

    As output of ``compute`` the metric returns a scalar tensor (float64).

    Raises:
        ValueError: for a delta out of range.

    Example:
        >>> from lightning_dp.accounting import Ledger, PrivacyEvent
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
        >>> round(float(Epsilon(ledger, delta=1e-5, accountant="gdp").compute()), 4)
        4.3772
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, source: Any, delta: float, accountant: str | Accountant | None = None, **kwargs: Any) -> None:
        # the ledger grows without `update`: a value once computed must not be handed out again
        super().__init__(**{**kwargs, "compute_with_cache": False})
        self.delta = check.check_probability("delta", delta)
        if not isinstance(source, Ledger) and not isinstance(getattr(source, "ledger", None), Ledger):
            raise TypeError(
                f"Expected a private strategy or a Ledger, got {type(source).__name__}. Pass trainer.strategy or its ledger."
            )
        self._source = source
        chosen = getattr(source, "accountant", "pld") if accountant is None else accountant
        self._accountant: Accountant = make_accountant(chosen) if isinstance(chosen, str) else chosen
        # the value does not come from updates, so there is nothing to warn about when none was made
        self._update_called_once = True
        self._update_count = 1

    @property
    def ledger(self) -> Ledger:
        """The ledger that is read."""
        return self._source if isinstance(self._source, Ledger) else self._source.ledger

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to add: the ledger is written where the noise is drawn."""

    def compute(self) -> Tensor:
        """Epsilon now."""
        value = math.nan if self.ledger.num_steps == 0 else self._accountant.epsilon(self.ledger, self.delta)
        return torch.tensor(value, dtype=torch.float64)

    def reset(self) -> None:
        """Forgets nothing: the ledger stays."""
        super().reset()
        self._update_count = 1
