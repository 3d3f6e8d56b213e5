"""The comparison of records within a batch of a real size with the same records run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import ComparisonError, PrivacyError
from lightning_dp.per_sample.independence import compare_with_singles
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.trials import exchange
from lightning_dp.trials.couplings import TOLERANCE
from lightning_dp.trials.draws import HIGH, MIDDLE, Draws
from lightning_dp.trials.runs import TrialRuns

Rows = Mapping[str, Tensor]


def check_in_batch(
    runs: TrialRuns,
    snapshot: Snapshot,
    records: list[Any],
    *,
    seed: int,
    agree: Callable[[bool], bool] = bool,
    places: Sequence[int] = (),
) -> None:
    """Compare the gradients of three samples in a batch with those of the samples run alone.

    A difference that comes from rounding, which makes another choice (a maximum, an expert), does not show where
    parameters are moved a little; a coupling does. If user code draws, they are compared with high draws too, because
    the middle one of symmetrical noise is 0, whatever its scale.

    Args:
        runs: run the user's step.
        snapshot: of the state before the runs.
        records: of the batch.
        seed: of the random draws.
        agree: tells whether a flag is set on any of the processes that run this check together.
        places: of at most two samples to compare; else the first one, and the one in the middle.

    Raises:
        PrivacyError: a gradient depends on the rest of the batch, on any of these processes.
    """
    for coin in (MIDDLE, HIGH) if agree(runs.has_coins) else (MIDDLE,):
        _check(runs, snapshot, records, Draws(seed=seed, coin=coin), agree, places)


def _check(
    runs: TrialRuns,
    snapshot: Snapshot,
    records: list[Any],
    draws: Draws,
    agree: Callable[[bool], bool],
    chosen: Sequence[int],
) -> None:
    size = len(records)
    # always three, because ranks with batches of other sizes run as often
    places = [*[*(place for place in chosen if place < size), 0, size // 2][:2], size - 1]
    for moved in range(1 + exchange.NUM_REPEATS):
        try:
            error, found = None, _difference(runs, snapshot, records, replace(draws, moved=moved), agree, places)
        except PrivacyError as cause:
            error = found = cause
        if error is not None and not isinstance(error, ComparisonError):
            raise error
        if not agree(found is not None):
            return
    raise found or ComparisonError(
        "Expected the gradient of every sample in a batch to be its gradient when run alone, got another one on "
        "another rank. Its own message says more."
    )


def _difference(
    runs: TrialRuns,
    snapshot: Snapshot,
    records: list[Any],
    draws: Draws,
    agree: Callable[[bool], bool],
    places: list[int],
) -> PrivacyError | None:
    """Return the error that tells how samples in a batch differ from the samples alone; None if they do not."""
    step, size = runs.step, len(records)
    known = dict(step.module.named_parameters())

    def read(rows: list[int], names: list[str]) -> list[dict[str, Tensor]]:
        parameters = {name: known[name] for name in names}
        like = step.reduction.squared_norms(step.engine, [[name] for name in names])
        chosen = torch.eye(size, dtype=like.dtype, device=like.device)[rows]
        return [step.reduction.weighted_sum(step.engine, row, parameters) for row in chosen]

    def rows_in(batch: list[Any]) -> dict[str, Tensor]:
        order = runs.host.training.order.rows_of(batch)
        rows = places if order is None else order[places].tolist()
        found = runs.again(snapshot, batch, draws, engine=True, read=partial(read, rows)).found
        return {name: torch.stack([sums[i][name] for i in range(len(places))]) for sums in found for name in sums[0]}

    batched, scale = rows_in(records), runs.scale(size)
    compare = partial(
        _compare, batched, scale=scale, rtol=TOLERANCE[runs.coarsest(step.engine.dtypes)], module=step.module
    )

    def alone(record: Any) -> Rows:
        trained = [p for accumulator in step.accumulators.values() for p in accumulator.parameters.values()]
        if all(parameter.requires_grad for parameter in trained):
            return runs.again(snapshot, [record], draws).private
        copies = runs.host.copies  # the step itself lets the others train, which autograd would see too late
        found = runs.again(snapshot, [record] * copies, draws, engine=True).private
        return {name: rows[0] * runs.scale(copies) for name, rows in found.items()}

    error = compare([alone(records[place]) for place in places])
    if not agree(error is not None and runs.draws_on_host):
        return error
    # a record alone gets the draws of the first one: look at it in its place, among copies of itself
    among = [rows_in([records[place]] * size) for place in places]
    return compare([{name: rows[i] * scale for name, rows in one.items()} for i, one in enumerate(among)])


def _compare(batched: Rows, singles: Iterable[Rows], **how: Any) -> PrivacyError | None:
    try:
        compare_with_singles(batched, singles, **how)
    except PrivacyError as error:
        return error
    return None
