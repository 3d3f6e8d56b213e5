"""Conversion of ledgers to events of the library dp-accounting."""

from __future__ import annotations

from collections.abc import Mapping

import dp_accounting

from lightning_dp.accounting.events import Mechanism


def to_dp_event(mechanisms: Mapping[Mechanism, int], *, replaces: bool = False) -> dp_accounting.DpEvent:
    """Return all mechanisms of a ledger as one event of dp-accounting.

    Noise multipliers of that library are relative to the bound C on one contribution. Under "replace_one" they are
    therefore twice ours, as its `PLDAccountant` with `REPLACE_ONE` expects. Its `RdpAccountant` does not double the
    sensitivity and must not be given this event. The library has no event for random allocation, so such a pass becomes
    one Gaussian, an upper bound.

    Args:
        mechanisms: Result of `Ledger.mechanisms`.
        replaces: True if the relation is "replace_one".

    Returns:
        One event per distinct mechanism, composed; `NoOpDpEvent` if none, `NonPrivateDpEvent` if one has no noise.
    """
    scale = 2.0 if replaces else 1.0
    events = []
    for (sample_rate, noise_multiplier, num_batches), count in mechanisms.items():
        if noise_multiplier == 0:
            return dp_accounting.NonPrivateDpEvent()
        event = dp_accounting.GaussianDpEvent(scale * noise_multiplier)
        if sample_rate < 1 and num_batches == 1:
            event = dp_accounting.PoissonSampledDpEvent(sample_rate, event)
        events.append(dp_accounting.SelfComposedDpEvent(event, count))
    return dp_accounting.ComposedDpEvent(events) if events else dp_accounting.NoOpDpEvent()
