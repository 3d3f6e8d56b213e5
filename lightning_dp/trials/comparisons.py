"""The comparisons of gradients in one series: before the first step, and at a later step."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.trials.couplings import NUM_SPARES, Couplings
from lightning_dp.trials.in_batches import check_in_batch
from lightning_dp.trials.runs import TrialRuns
from lightning_dp.trials.vanishing import compare


class Comparisons:
    """All comparisons of per-sample gradients with other ones that a trial makes.

    Args:
        runs: run the user's step.
        couplings: compare gradients in batches of which one record differs.
    """

    def __init__(self, runs: TrialRuns, couplings: Couplings) -> None:
        self._runs, self._couplings = runs, couplings

    def check(self, snapshot: Snapshot, records: list[Any]) -> None:
        """Check records before the first step.

        Args:
            snapshot: of the state before the runs.
            records: from all over the training set.

        Raises:
            PrivacyError: a sample's gradient depends on another sample, or is not its own.
        """
        real = self._couplings.real_records(0)
        compare(self._runs, snapshot, real, partial(self._check, records, real[: self._runs.host.batch_size]))

    def _check(self, records: list[Any], real: list[Any], snapshot: Snapshot) -> None:
        self._couplings.check_alone(snapshot, records)
        self._couplings.check_exchange(snapshot, records)
        if self._runs.step.takes_own_losses:
            check_in_batch(self._runs, snapshot, real, seed=0)

    def check_again(
        self, snapshot: Snapshot, records: list[Any], positions: list[int] | None = None, *, number: int
    ) -> None:
        """Check records at a later step.

        Args:
            snapshot: of the state before the runs.
            records: of a batch of the real size and for the exchanges.
            positions: of the records of a real batch, if that is to be looked at.
            number: of the logical step.

        Raises:
            PrivacyError: as in :meth:`check`.
        """
        batch = self._runs.host.read(positions) if positions else []
        spares = [record for record in records if not any(record is own for own in batch)][-NUM_SPARES:]
        real = len(batch) > 1 and spares and self._runs.step.reduction.world_size == 1
        exchanged, size = ([*batch, *spares], len(batch)) if real else (records, 0)
        check = partial(self._check_again, records, exchanged, self._runs.take_exchanged(), size, number)
        compare(self._runs, snapshot, exchanged, check)

    def _check_again(
        self, records: list[Any], exchanged: list[Any], found: Any, size: int, number: int, snapshot: Snapshot
    ) -> None:
        if found is not None:
            self._couplings.exchange_collated(snapshot, found, seed=number)
        self._couplings.exchange_one(snapshot, exchanged, seed=number, size=size)
        if self._runs.step.takes_own_losses:
            check_in_batch(self._runs, snapshot, records[: self._runs.host.batch_size], seed=number)
