"""Epsilon as a torchmetrics Metric that reads a ledger and never changes it."""

from __future__ import annotations

import copy
import math
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.accounting import Accountant, Ledger, make_accountant
from lightning_dp.errors import PrivacyError

#: Attributes that a copy shares with its original.
_SHARED = ("_source", "_accountant")


class Epsilon(Metric):
    """Epsilon spent at ``delta``, computed from a ledger.

    ``compute()`` returns ``accountant.epsilon(ledger, delta)``, or NaN (not 0) before any step is recorded.

    **Guarantee**: resetting the metric, as Lightning does every epoch, never touches the ledger. The value depends on
    public settings only. It is the same on every rank, so nothing is reduced. Copies (``clone``, ``deepcopy``, also as
    part of a module or a ``MetricCollection``) read the same ledger, so no copy reports an old epsilon. A pickle holds
    no ledger, so a metric loaded from it refuses to compute. The exception is a spawned process, which receives the
    metric together with its run.

    Args:
        source: a private strategy (its ledger, also after a resume) or a ``Ledger``.
        delta: in (0, 1).
        accountant: name of an accountant, such as "pld", or an ``Accountant``; default: the strategy's, or "pld".

    As input, ``forward`` and ``update`` accept any arguments and ignore them.

    As output, ``compute`` returns a scalar tensor (float64).

    Raises:
        ValueError: a delta out of range, or an unknown accountant.
        PrivacyError: on ``compute`` of an unpickled metric.

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
                f"Expected a private strategy or a Ledger, got {type(source).__name__}. Pass trainer.strategy or its "
                "ledger."
            )
        self._source = source
        chosen = getattr(source, "accountant", "pld") if accountant is None else accountant
        self._accountant: Accountant = make_accountant(chosen) if isinstance(chosen, str) else chosen
        # the value does not come from updates, so there is nothing to warn about when none was made
        self._update_called_once = True
        self._update_count = 1

    @property
    def ledger(self) -> Ledger:
        """The ledger that the metric reads.

        Raises:
            PrivacyError: the metric was unpickled.
        """
        if self._source is None:
            raise PrivacyError(
                "This Epsilon was unpickled without the ledger of its run, so its value would be out of date. Make "
                "another one: Epsilon(trainer.strategy, delta=...)."
            )
        return self._source if isinstance(self._source, Ledger) else self._source.ledger

    def __deepcopy__(self, memo: dict[int, Any]) -> Epsilon:
        """Return a copy that reads the same ledger."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = super().__getstate__()
        shared = {name: state.pop(name) for name in _SHARED}
        copied.__setstate__({**copy.deepcopy(state, memo), **shared})
        return copied

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a pickle, without the ledger unless a process is being spawned."""
        state: dict[str, Any] = super().__getstate__()
        return state if get_spawning_popen() is not None else {**state, "_source": None}

    @override
    def update(self, *args: Any, **kwargs: Any) -> None:
        """Ignore all arguments: the value comes from the ledger."""

    @override
    def compute(self) -> Tensor:
        """Return the current epsilon, a float64 scalar; NaN before any step is recorded."""
        value = math.nan if self.ledger.num_steps == 0 else self._accountant.epsilon(self.ledger, self.delta)
        return torch.tensor(value, dtype=torch.float64)

    @override
    def reset(self) -> None:
        """Reset the metric's own state; the ledger does not change."""
        super().reset()
        self._update_count = 1
