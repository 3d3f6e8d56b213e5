"""The ledger of releases of the private data: runs of equal events, small enough for every checkpoint.

One entry is one run: an event, its number of steps and, if the kind has passes, its number of passes. A hundred
thousand equal steps are one entry. Accountants read the ledger through `Ledger.mechanisms`, which counts the
mechanisms to account for after parallel composition inside each pass.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import dp_accounting

from lightning_dp.accounting.dp_events import to_dp_event
from lightning_dp.accounting.events import (
    LedgerEntry,
    Mechanism,
    PlannedRun,
    PrivacyEvent,
    check_count,
    check_event,
    parse_run,
)
from lightning_dp.accounting.ledger_state import LedgerState, begins, check_relation, read_state, write_state
from lightning_dp.errors import PrivacyError

__all__ = ["NEIGHBORING_RELATIONS", "Ledger", "LedgerEntry", "Mechanism", "PrivacyEvent"]

NEIGHBORING_RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")
UNITS = ("record", "user")


class Ledger:
    """All releases of a training run in order, stored as runs of equal events.

    cost = sum over runs; a pass costs one mechanism with the smallest noise multiplier of the pass

    **Guarantee**: entries hold public values only. The ledger never forgets a step: it grows, and `amend_last`
    replaces one step by another. The ledger may be published.

    "poisson" steps are Poisson-subsampled Gaussians and "gaussian" steps are Gaussians. The steps of one "shuffle" pass
    compose in parallel, because each sample is in exactly one of its batches: together they cost one Gaussian. The
    steps of one "allocation" pass cost less, because that batch is also drawn uniformly and in secret. A pass that is
    cut short costs a whole one. The steps of a run with "correlated" noise cost one Gaussian together, like a pass that
    is as long as the run. A pass ends at `start_pass`, when a step of another kind is recorded, and once an
    "allocation" pass or a "correlated" run has all its steps.

    Args:
        neighboring_relation: "add_or_remove_one"; "zero_out" (a sample is exchanged for one that contributes
            nothing: same numbers); "replace_one" (sensitivity is 2 C for contributions of norm at most C, and noise
            multipliers are relative to 2 C).
        unit: The unit whose presence the noise hides: one "record", or one "user" with all its records.

    Raises:
        ValueError: If the relation or the unit is unknown.

    Example:
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.poisson(noise_multiplier=1.1, sample_rate=0.01), count=100_000)
        >>> ledger.num_steps, len(ledger.entries)
        (100000, 1)
    """

    def __init__(self, neighboring_relation: str = "add_or_remove_one", unit: str = "record") -> None:
        if neighboring_relation not in NEIGHBORING_RELATIONS:
            raise ValueError(
                f"Expected neighboring_relation in {NEIGHBORING_RELATIONS}, got "
                f"neighboring_relation={neighboring_relation!r}."
            )
        if unit not in UNITS:
            raise ValueError(f"Expected unit in {UNITS}, got unit={unit!r}. Pass one of these.")
        self.__setstate__(LedgerState(neighboring_relation, unit, uuid.uuid4().hex, pass_open=False, entries=()))

    @property
    def neighboring_relation(self) -> str:
        """The relation between neighbouring datasets; fixed for the life of the ledger."""
        return self._neighboring_relation

    @property
    def unit(self) -> str:
        """The unit whose presence is hidden, "record" or "user"; fixed for the life of the ledger."""
        return self._unit

    @property
    def lineage(self) -> str:
        """Identifier of this history, created with the ledger and kept by copies and checkpoints."""
        return self._lineage

    @property
    def runs(self) -> dict[str, int]:
        """The runs that wrote this history, oldest first, and the number of its steps when the next one resumed."""
        names, starts = zip(*self._resumed, strict=True) if self._resumed else ((), ())
        return dict(zip((self._lineage, *names), (*starts, self.num_steps), strict=True))

    @property
    def num_steps(self) -> int:
        """Number of logical steps recorded."""
        return sum(entry.num_steps for entry in self._entries)

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """The runs of equal events, oldest first."""
        return tuple(self._entries)

    def record(self, event: PrivacyEvent, count: int = 1) -> None:
        """Append `count` steps with the same event.

        If the kind has passes, the steps join the open pass; a new pass opens if none is open or the open one is full.

        Args:
            event: Event of each step.
            count: Number of steps, at least 1.

        Raises:
            ValueError: If count is not a positive integer, or the ledger's relation does not allow the kind.
            TypeError: If event is not a `PrivacyEvent`.
        """
        check_event(event)
        count = check_count(count, name="count", minimum=1)
        check_relation(event, self._neighboring_relation)
        if event.has_passes:
            self._record_in_passes(event, count)
            return
        self.start_pass()
        self._append(LedgerEntry(event, count))

    def record_run(self, run: PlannedRun) -> None:
        """Append a planned run.

        Args:
            run: `(event, steps)` or `(event, steps, passes)`, as in `extended`.
        """
        event, num_steps, num_passes = parse_run(run)
        if num_passes == 0:
            self.record(event, num_steps)
            return
        check_relation(event, self._neighboring_relation)
        num_last = num_steps // num_passes  # which pass a step is in costs nothing: the open one gets its share
        self.start_pass()
        if num_passes > 1:
            self._append(LedgerEntry(event, num_steps - num_last, num_passes - 1))
        self.record(event, num_last)

    def amend_last(self, event: PrivacyEvent) -> None:
        """Replace the last recorded step by `event`.

        If two private optimizers step on one batch, their releases are one event of combined precision.

        **Guarantee**: never cheaper than the truth. An open pass of several steps keeps the smallest noise multiplier
        that it has seen, the replaced step included.

        Args:
            event: Complete event of the last step.

        Raises:
            PrivacyError: If no step is recorded.
            TypeError: If event is not a `PrivacyEvent`.
        """
        check_event(event)
        if not self._entries:
            raise PrivacyError("Expected a recorded step to amend, got an empty ledger. Record the step first.")
        last = self._entries.pop()
        if last.num_steps > 1:
            self._entries.append(LedgerEntry(last.event, last.num_steps - 1, min(last.num_passes, last.num_steps - 1)))
        else:
            self._pass_open = False
        self.record(event)

    def start_pass(self) -> None:
        """Close the open pass, so that the next step of a kind with passes starts a new one."""
        self._pass_open = False
        if len(self._entries) > 1:
            self._append(self._entries.pop())

    def copy(self) -> Ledger:
        """Return an independent ledger with the same history and lineage."""
        return copy.copy(self)

    def resumed(self) -> Ledger:
        """Return a copy whose further steps are not taken for those of other runs that continue this history."""
        ledger, state = self.copy(), self.__getstate__()
        ledger.__setstate__(state._replace(resumed=(*state.resumed, (uuid.uuid4().hex, self.num_steps))))
        return ledger

    def __getstate__(self) -> LedgerState:
        known = self._neighboring_relation, self._unit, self._lineage, self._pass_open
        return LedgerState(*known, tuple(self._entries), self._resumed)

    def __setstate__(self, state: LedgerState) -> None:
        self._neighboring_relation, self._unit, self._lineage, self._pass_open, entries, self._resumed = state
        self._entries: list[LedgerEntry] = list(entries)

    def extended(self, runs: Iterable[PlannedRun]) -> Ledger:
        """Return a copy with planned runs added.

        Args:
            runs: Items `(event, steps)` or `(event, steps, passes)`. `passes` is for kinds that have passes: the number
                of passes that these steps start, at most `steps`. 0 continues the open pass; the default is the
                smallest number that can hold the steps.

        Returns:
            The extended copy; this ledger is unchanged.

        Raises:
            ValueError: If an item has another length, a count is no integer in range, passes are given for another
                kind, or the relation does not allow a kind.
            TypeError: If an item does not begin with a `PrivacyEvent`.
        """
        ledger = self.copy()
        for run in runs:
            ledger.record_run(run)
        return ledger

    def has_same_beginning(self, other: Ledger) -> bool:
        """Return whether `other` begins with the steps of this ledger, even if it is of another run."""
        theirs = other.__getstate__()
        return begins(self.__getstate__()._replace(lineage=theirs.lineage, resumed=theirs.resumed), theirs)

    def is_prefix_of(self, other: Ledger) -> bool:
        """Return whether `other` is this history or a continuation of it.

        Lineage, relation, unit, resumed runs and every recorded step must agree.
        """
        return begins(self.__getstate__(), other.__getstate__())

    def mechanisms(self) -> dict[Mechanism, int]:
        """Return the number of times that each mechanism was run.

        A pass counts once, by parallel composition. Unsampled releases have sample rate 1, and unprotected releases
        have noise multiplier 0. Steps with sample rate 0 are left out.

        Returns:
            Counts in the order of first appearance. Public.
        """
        counts: dict[Mechanism, int] = {}
        for entry in self._entries:
            key = entry.event.mechanism
            if key.sample_rate > 0:
                counts[key] = counts.get(key, 0) + (entry.num_passes or entry.num_steps)
        return counts

    def dp_event(self) -> dp_accounting.DpEvent:
        """Return the history as an event of dp-accounting; see `to_dp_event`."""
        return to_dp_event(self.mechanisms(), replaces=self._neighboring_relation == "replace_one")

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger as plain integers, floats, strings, lists and dictionaries."""
        return write_state(self.__getstate__())

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Ledger:
        """Return the ledger that `state_dict` described.

        **Guarantee**: any other state is refused, never repaired. A round trip through JSON changes nothing.

        Raises:
            PrivacyError: If anything is missing, unknown, of the wrong type or out of range.
        """
        try:
            parts = read_state(state)
            ledger = cls(parts.neighboring_relation, parts.unit)
        except (ValueError, TypeError) as error:
            raise PrivacyError(
                f"Expected an intact ledger, got a state that cannot be read: {error} "
                "The privacy already spent is unknown; restore a checkpoint whose ledger is intact."
            ) from error
        ledger.__setstate__(parts)
        return ledger

    def _record_in_passes(self, event: PrivacyEvent, count: int) -> None:
        limit = event.steps_per_pass
        if self._pass_open and self._entries[-1].event.shares_pass(event):
            last = self._entries.pop()
            taken = count if limit is None else min(count, limit - last.num_steps)
            smallest = min(event, last.event, key=lambda e: e.noise_multiplier) if taken else last.event
            self._entries.append(LedgerEntry(smallest, last.num_steps + taken, 1))
            count -= taken
            if not count:
                return
        self.start_pass()
        if limit is not None and count > limit:
            whole = (count - 1) // limit
            self._append(LedgerEntry(event, whole * limit, whole))
            count -= whole * limit
        self._pass_open = True
        self._entries.append(LedgerEntry(event, count, 1))  # merged with earlier passes once it is finished

    def _append(self, entry: LedgerEntry) -> None:
        last = self._entries[-1] if self._entries else None
        if last is not None and last.event == entry.event:
            self._entries[-1] = LedgerEntry(
                entry.event, last.num_steps + entry.num_steps, last.num_passes + entry.num_passes
            )
        else:
            self._entries.append(entry)
