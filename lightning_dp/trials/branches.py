"""Branches of the user's step that only some records take, such as one for missing values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import UNLEARNED
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.trials.draws import Draws
from lightning_dp.trials.runs import TrialRuns

#: Branches that are learned before samples run one at a time.
NUM_BRANCHES = 4


class Branches:
    """The branches that runs of the checks took after the layout was learned.

    A branch is learned from two records of which one takes it, in addition to what is known, and all checks begin
    again. So a use that no learned layout explains is refused as ever.

    Args:
        runs: run the user's step.
    """

    def __init__(self, runs: TrialRuns) -> None:
        self._runs = runs
        self._tried: list[str] = []

    def learn(
        self, snapshot: Snapshot, error: PrivacyError | None, learn: Callable[[list[Any]], PrivacyError | None]
    ) -> bool:
        """Learn the branch that a run of the checks took; return False if there is none, or if it was tried before.

        Args:
            snapshot: of the state before the runs.
            error: that the run raised, or None.
            learn: infers, from two records, layouts in addition to those known; returns why it cannot.
        """
        is_known = error is None or UNLEARNED not in str(error) or str(error) in self._tried
        if is_known or len(self._tried) == NUM_BRANCHES or self._runs.step.reduction.world_size > 1:
            return False
        self._tried.append(str(error))
        records = self._runs.raised_on
        found = next((record for record in records if self._takes_it(snapshot, record)), None)
        if found is None or len(records) < 2:
            return False
        return learn([found, next(record for record in records if record is not found)]) is None

    def _takes_it(self, snapshot: Snapshot, record: Any) -> bool:
        try:
            self._runs.again(snapshot, [record], Draws(), engine=True)
        except PrivacyError as error:
            return UNLEARNED in str(error)
        except Exception:  # the user's code refuses such a record alone
            return False
        return False
