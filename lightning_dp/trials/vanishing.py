"""Comparisons of gradients, under other weights if gradients at the weights of the run are zero up to rounding.

A student that begins as a copy of its teacher, or a loss that is constant at first, has gradients that cancel. What is
left is rounding, which changes with the size of a batch, so that a comparison shows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import ComparisonError
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.trials.chosen_records import differing
from lightning_dp.trials.couplings import NUM_ALONE
from lightning_dp.trials.draws import Draws
from lightning_dp.trials.runs import TrialRuns

#: Length of a gradient, relative to that under other weights and in units of rounding, up to which it is rounding.
MOST_ROUNDING = 64.0


def compare(runs: TrialRuns, snapshot: Snapshot, records: list[Any], check: Callable[[Snapshot], None]) -> None:
    """Run checks that compare gradients; if they fail where gradients are zero up to rounding, under other weights.

    **Guarantee**: other weights are taken only if the gradients of a batch of the records, and of a few of them alone,
    are shorter than 64 roundings of those under the other weights. Later checks look at the weights of their step.

    Args:
        runs: run the user's step.
        snapshot: of the state before the runs.
        records: whose gradients tell, as many as a batch has, or more.
        check: runs them, given a snapshot.

    Raises:
        ComparisonError: of the checks.
    """
    try:
        check(snapshot)
    except ComparisonError:
        if runs.step.reduction.world_size > 1 or not _vanish(runs, snapshot, records):
            raise
        private = (each.parameters.values() for each in runs.step.accumulators.values())
        Draws(far=True).move(chain.from_iterable(private))
        try:
            with runs.sandbox.enter() as elsewhere:
                check(elsewhere)
        finally:
            snapshot.put_back()


def _vanish(runs: TrialRuns, snapshot: Snapshot, records: list[Any]) -> bool:
    """Tell whether no gradient at the weights of the run is more than rounding."""
    few, dtypes = differing(records)[:NUM_ALONE], set[torch.dtype]()
    batches = [records[: runs.host.batch_size], few, *([record] for record in few)]

    def longest(draws: Draws) -> float:
        found = [runs.again(snapshot, batch, draws).private for batch in batches]
        dtypes.update(gradient.dtype for gradients in found for gradient in gradients.values())
        return max(map(_length, found))

    here = longest(Draws(seed=1))
    try:
        there = longest(Draws(seed=1, far=True))
    except Exception:  # such weights need not be possible
        return False
    rounding = torch.finfo(runs.coarsest(dtypes)).eps if dtypes else 0.0
    return here <= MOST_ROUNDING * rounding * there < torch.inf


def _length(gradients: Mapping[str, Tensor]) -> float:
    return math.hypot(*(float(gradient.double().norm()) for gradient in gradients.values()))
