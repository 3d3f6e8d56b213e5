"""What was released on the private data: runs of equal events, small enough for every checkpoint.

One entry is one run: an event, how many steps it was taken and, where batches are shuffled, over how many passes.
A hundred thousand equal steps are one entry. Accountants read the ledger through `Ledger.mechanisms`, which states
what is paid once parallel composition inside a pass has been used.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import dp_accounting

from lightning_dp.accounting.events import LedgerEntry, PlannedRun, PrivacyEvent, check_count, check_event, parse_run
from lightning_dp.errors import PrivacyError

__all__ = ["NEIGHBORING_RELATIONS", "Ledger", "LedgerEntry", "PrivacyEvent"]

NEIGHBORING_RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")

_STATE_VERSION = 1
_STATE_KEYS = {"version", "neighboring_relation", "lineage", "pass_open", "num_steps", "entries"}
_ENTRY_KEYS = {"kind", "noise_multiplier", "sample_rate", "reason", "num_steps", "num_passes"}


class Ledger:
    """Every release of a run, in order, as runs of equal events.

    cost = sum over runs; a pass of kind "shuffle" costs one Gaussian with the smallest noise multiplier of the pass

    Guarantee: entries hold public values only. The ledger never forgets a step: it grows, and `amend_last` exchanges
    one step for another. What is not private: nothing; the ledger may be published.

    "poisson" steps are Poisson-subsampled Gaussians, "gaussian" steps are Gaussians, and the steps of one "shuffle"
    pass compose in parallel, because each sample is in exactly one of its batches. A pass ends at `start_pass` and
    wherever a step of another kind is recorded.

    Args:
        neighboring_relation: "add_or_remove_one"; "zero_out" (a sample is exchanged for one that contributes
            nothing: same numbers); "replace_one" (sensitivity is 2 C for contributions of norm at most C, and noise
            multipliers are relative to 2 C).

    Raises:
        ValueError: If the relation is unknown.

    Example:
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.poisson(noise_multiplier=1.1, sample_rate=0.01), count=100_000)
        >>> ledger.num_steps, len(ledger.entries)
        (100000, 1)
    """

    def __init__(self, neighboring_relation: str = "add_or_remove_one") -> None:
        if neighboring_relation not in NEIGHBORING_RELATIONS:
            raise ValueError(
                f"Expected neighboring_relation in {NEIGHBORING_RELATIONS}, "
                f"got neighboring_relation={neighboring_relation!r}."
            )
        self._neighboring_relation = neighboring_relation
        self._lineage = uuid.uuid4().hex
        self._entries: list[LedgerEntry] = []
        self._pass_open = False

    @property
    def neighboring_relation(self) -> str:
        """What a neighbouring data set is; fixed for the life of the ledger."""
        return self._neighboring_relation

    @property
    def lineage(self) -> str:
        """Name of this history, made when the ledger is created and kept by copies and checkpoints."""
        return self._lineage

    @property
    def num_steps(self) -> int:
        """Number of logical steps recorded."""
        return sum(entry.num_steps for entry in self._entries)

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """The runs, oldest first."""
        return tuple(self._entries)

    def record(self, event: PrivacyEvent, count: int = 1) -> None:
        """Append `count` equal steps.

        Steps of kind "shuffle" join the open pass; the first one opens a pass where none is open.

        Args:
            event: What each of the steps releases.
            count: Number of steps, at least 1.

        Raises:
            ValueError: If count is not a positive integer.
            TypeError: If event is not a `PrivacyEvent`.
        """
        check_event(event)
        count = check_count(count, name="count", minimum=1)
        if event.kind == "shuffle":
            self._record_shuffle(event, count)
            return
        self.start_pass()
        self._append(LedgerEntry(event, count))

    def amend_last(self, event: PrivacyEvent) -> None:
        """Exchange the last recorded step for `event`.

        Two private optimizers that step on one batch are one event, of combined precision.

        Guarantee: never cheaper than the truth. An open "shuffle" pass of several steps keeps the smallest noise
        multiplier it has seen, that of the exchanged step included.

        Args:
            event: What the last step released in full.

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
        elif event.kind == "shuffle" and last.event.kind == "shuffle":
            self._pass_open = False
        self.record(event)

    def start_pass(self) -> None:
        """Start a new pass over shuffled data: the steps that follow are paid apart from those before."""
        self._pass_open = False
        if len(self._entries) > 1:
            self._append(self._entries.pop())

    def copy(self) -> Ledger:
        """Return an independent ledger with the same history and lineage."""
        other = Ledger(self._neighboring_relation)
        other._lineage = self._lineage
        other._entries = list(self._entries)
        other._pass_open = self._pass_open
        return other

    def extended(self, runs: Iterable[PlannedRun]) -> Ledger:
        """Return a copy to which planned runs are added.

        Args:
            runs: Items `(event, steps)` or `(event, steps, passes)`. `passes` is for kind "shuffle": the number of
                passes that these steps start, at most `steps`; 0 continues the open pass; left out it is 1.

        Returns:
            The extended copy; this ledger is unchanged.

        Raises:
            ValueError: If an item has another length, a count is no integer in range, or passes are given for
                another kind.
        """
        ledger = self.copy()
        for run in runs:
            event, num_steps, num_passes = parse_run(run)
            if event.kind != "shuffle" or num_passes == 0:
                ledger.record(event, num_steps)
                continue
            num_last = num_steps // num_passes  # which pass a step is in costs nothing: the open one gets its share
            ledger.start_pass()
            if num_passes > 1:
                ledger._append(LedgerEntry(event, num_steps - num_last, num_passes - 1))
            ledger.record(event, num_last)
        return ledger

    def has_same_beginning(self, other: Ledger) -> bool:
        """Return whether `other` begins with the steps of this ledger, whatever its lineage.

        Args:
            other: The ledger of a run that may have begun with this history.
        """
        unnamed = self.copy()
        unnamed._lineage = other._lineage
        return unnamed.is_prefix_of(other)

    def is_prefix_of(self, other: Ledger) -> bool:
        """Return whether `other` is this history or a continuation of it.

        Args:
            other: The ledger that may have grown out of this one.

        Returns:
            True if lineage, relation and every recorded step agree.
        """
        if (self._lineage, self._neighboring_relation) != (other._lineage, other._neighboring_relation):
            return False
        finished, opened = (self._entries[:-1], self._entries[-1]) if self._pass_open else (self._entries, None)
        rest = list(other._entries)
        for entry in finished:
            if not rest or rest[0].event != entry.event:
                return False
            head = rest.pop(0)
            num_steps, num_passes = head.num_steps - entry.num_steps, head.num_passes - entry.num_passes
            if min(num_steps, num_passes) < 0 or (num_steps == 0 and num_passes > 0):
                return False
            if num_steps:
                rest.insert(0, LedgerEntry(head.event, num_steps, num_passes))
        if opened is None:
            return True
        return (
            bool(rest)
            and rest[0].event.kind == "shuffle"
            and rest[0].event.noise_multiplier <= opened.event.noise_multiplier
            and rest[0].num_steps >= opened.num_steps
        )

    def mechanisms(self) -> dict[tuple[float, float], int]:
        """Return what is paid: the number of releases of each (sample rate, noise multiplier).

        Parallel composition inside passes is used here; unsampled releases have rate 1; releases that nothing
        protects have multiplier 0; steps that no sample can join are left out.

        Returns:
            Counts in the order of first appearance. Public.
        """
        counts: dict[tuple[float, float], int] = {}
        for entry in self._entries:
            key = (entry.event.sample_rate, entry.event.noise_multiplier)
            if key[0] > 0:
                counts[key] = counts.get(key, 0) + (entry.num_passes or entry.num_steps)
        return counts

    def dp_event(self) -> dp_accounting.DpEvent:
        """Return the history as an event of dp-accounting.

        Noise multipliers of that library are relative to the bound C on one contribution. Under "replace_one" they
        are therefore twice ours, which is what its `PLDAccountant` with `REPLACE_ONE` expects; its `RdpAccountant`
        does not double the sensitivity and must not be given this event.

        Returns:
            A composition of at most one event a distinct mechanism; `NoOpDpEvent` if nothing is paid.
        """
        scale = 2.0 if self._neighboring_relation == "replace_one" else 1.0
        events = []
        for (sample_rate, noise_multiplier), count in self.mechanisms().items():
            if noise_multiplier == 0:
                return dp_accounting.NonPrivateDpEvent()
            event = dp_accounting.GaussianDpEvent(scale * noise_multiplier)
            if sample_rate < 1:
                event = dp_accounting.PoissonSampledDpEvent(sample_rate, event)
            events.append(dp_accounting.SelfComposedDpEvent(event, count))
        return dp_accounting.ComposedDpEvent(events) if events else dp_accounting.NoOpDpEvent()

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger as plain integers, floats, strings, lists and dictionaries."""
        return {
            "version": _STATE_VERSION,
            "neighboring_relation": self._neighboring_relation,
            "lineage": self._lineage,
            "pass_open": int(self._pass_open),
            "num_steps": self.num_steps,
            "entries": [
                {
                    "kind": entry.event.kind,
                    "noise_multiplier": entry.event.noise_multiplier,
                    "sample_rate": entry.event.sample_rate,
                    "reason": entry.event.reason,
                    "num_steps": entry.num_steps,
                    "num_passes": entry.num_passes,
                }
                for entry in self._entries
            ],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Ledger:
        """Return the ledger that `state_dict` described.

        Guarantee: what is not exactly such a description is refused, never repaired.

        Args:
            state: What `state_dict` returned, perhaps through JSON.

        Raises:
            PrivacyError: If anything is missing, unknown, of the wrong type or out of range.
        """
        try:
            return cls._read_state(state)
        except (ValueError, TypeError) as error:
            raise PrivacyError(
                f"Expected an intact ledger, got a state that cannot be read: {error} "
                "The privacy already spent is unknown; restore a checkpoint whose ledger is intact."
            ) from error

    @classmethod
    def _read_state(cls, state: Mapping[str, Any]) -> Ledger:
        _check_keys(state, _STATE_KEYS, name="state")
        if check_count(state["version"], name="version", minimum=0) != _STATE_VERSION:
            raise ValueError(f"Expected version={_STATE_VERSION}, got version={state['version']}.")
        ledger = cls(state["neighboring_relation"])
        if not isinstance(state["lineage"], str) or not re.fullmatch("[0-9a-f]{32}", state["lineage"]):
            raise ValueError(f"Expected 32 hexadecimal digits, got lineage={state['lineage']!r}.")
        ledger._lineage = state["lineage"]
        if not isinstance(state["entries"], list):
            raise TypeError(f"Expected a list of entries, got {type(state['entries']).__name__}.")
        ledger._entries = [_read_entry(entry) for entry in state["entries"]]
        if ledger.num_steps != check_count(state["num_steps"], name="num_steps", minimum=0):
            raise ValueError(
                f"Expected num_steps={ledger.num_steps} as the entries sum up to, got {state['num_steps']}."
            )
        pass_open = check_count(state["pass_open"], name="pass_open", minimum=0)
        last = ledger._entries[-1] if ledger._entries else None
        if pass_open > 1 or (pass_open and (last is None or last.num_passes != 1)):
            raise ValueError(f"Expected pass_open=1 only after an entry of one pass, got pass_open={pass_open}.")
        ledger._pass_open = bool(pass_open)
        return ledger

    def _record_shuffle(self, event: PrivacyEvent, count: int) -> None:
        if not self._pass_open:
            self._pass_open = True
            self._entries.append(LedgerEntry(event, count, 1))  # merged with earlier passes once it is finished
            return
        last = self._entries.pop()
        smallest = min(event, last.event, key=lambda e: e.noise_multiplier)
        self._entries.append(LedgerEntry(smallest, last.num_steps + count, 1))

    def _append(self, entry: LedgerEntry) -> None:
        last = self._entries[-1] if self._entries else None
        if last is not None and last.event == entry.event:
            self._entries[-1] = LedgerEntry(
                entry.event, last.num_steps + entry.num_steps, last.num_passes + entry.num_passes
            )
        else:
            self._entries.append(entry)


def _read_entry(entry: Any) -> LedgerEntry:
    _check_keys(entry, _ENTRY_KEYS, name="entry")
    event = PrivacyEvent(entry["kind"], entry["noise_multiplier"], entry["sample_rate"], entry["reason"])
    num_steps = check_count(entry["num_steps"], name="num_steps", minimum=1)
    num_passes = check_count(entry["num_passes"], name="num_passes", minimum=1 if event.kind == "shuffle" else 0)
    if num_passes > (num_steps if event.kind == "shuffle" else 0):
        raise ValueError(f"Expected passes that fit kind={event.kind!r}, got num_passes={num_passes}.")
    return LedgerEntry(event, num_steps, num_passes)


def _check_keys(value: Any, keys: set[str], *, name: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected a dictionary, got {name} of type {type(value).__name__}.")
    if set(value) != keys:
        raise ValueError(f"Expected keys {sorted(keys)}, got {name} with keys {sorted(map(str, value))}.")
