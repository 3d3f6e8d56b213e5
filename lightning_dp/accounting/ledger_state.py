"""Conversion of a ledger to plain values for checkpoints, and its validation when read back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_dp.accounting.events import COUNTED, LedgerEntry, PrivacyEvent, check_count, check_passes

_VERSION = 1
_KEYS = {"version", "neighboring_relation", "lineage", "pass_open", "num_steps", "entries"}
_OPTIONAL = {"unit", "resumed"}
_ENTRY_KEYS = {"kind", "noise_multiplier", "sample_rate", "reason", "num_steps", "num_passes"}


class LedgerState(NamedTuple):
    """The contents of a ledger."""

    neighboring_relation: str
    unit: str
    lineage: str
    pass_open: bool
    entries: tuple[LedgerEntry, ...]
    resumed: tuple[tuple[str, int], ...] = ()
    """Identifiers of the runs that continued this history, and the number of steps before each of them."""


def write_state(ledger: LedgerState) -> dict[str, Any]:
    """Return the contents as plain integers, floats, strings, lists and dictionaries."""
    # ledgers of records, and of runs that were not resumed, keep their old form
    unit = {} if ledger.unit == "record" else {"unit": ledger.unit}
    resumed = {"resumed": [list(run) for run in ledger.resumed]} if ledger.resumed else {}
    return {
        "version": _VERSION,
        "neighboring_relation": ledger.neighboring_relation,
        **unit,
        **resumed,
        "lineage": ledger.lineage,
        "pass_open": int(ledger.pass_open),
        "num_steps": sum(entry.num_steps for entry in ledger.entries),
        "entries": [_write_entry(entry) for entry in ledger.entries],
    }


def read_state(state: Mapping[str, Any]) -> LedgerState:
    """Return the contents that `write_state` described.

    Args:
        state: Result of `write_state`, possibly after a round trip through JSON.

    Raises:
        ValueError: If a key is missing or unknown, a value is out of range, or the relation does not allow a kind.
        TypeError: If a value has another type.
    """
    further = _OPTIONAL & set(state) if isinstance(state, Mapping) else set()
    _check_keys(state, _KEYS | further, name="state")
    if check_count(state["version"], name="version", minimum=0) != _VERSION:
        raise ValueError(f"Expected version={_VERSION}, got version={state['version']}.")
    lineage = _read_identifier(state["lineage"], name="lineage")
    if not isinstance(state["entries"], list):
        raise TypeError(f"Expected a list of entries, got {type(state['entries']).__name__}.")
    entries = tuple(_read_entry(entry) for entry in state["entries"])
    num_steps = sum(entry.num_steps for entry in entries)
    if num_steps != check_count(state["num_steps"], name="num_steps", minimum=0):
        raise ValueError(f"Expected num_steps={num_steps} as the entries sum up to, got {state['num_steps']}.")
    pass_open = check_count(state["pass_open"], name="pass_open", minimum=0)
    if pass_open > 1 or (pass_open and (not entries or entries[-1].num_passes != 1)):
        raise ValueError(f"Expected pass_open=1 only after an entry of one pass, got pass_open={pass_open}.")
    for entry in entries:
        check_relation(entry.event, state["neighboring_relation"])
    unit, resumed = state.get("unit", "record"), _read_resumed(state.get("resumed", []), num_steps)
    return LedgerState(state["neighboring_relation"], unit, lineage, bool(pass_open), entries, resumed)


def _read_resumed(runs: Any, num_steps: int) -> tuple[tuple[str, int], ...]:
    if not isinstance(runs, list) or not all(isinstance(run, (list, tuple)) and len(run) == 2 for run in runs):
        raise TypeError(f"Expected a list of pairs (run, steps before it), got resumed={runs!r}.")
    counts = [check_count(steps, name="steps before a run", minimum=0) for _, steps in runs]
    if counts != sorted(counts) or max(counts, default=0) > num_steps:
        raise ValueError(f"Expected counts that do not fall, up to {num_steps} steps, got resumed={runs!r}.")
    return tuple((_read_identifier(run, name="run"), steps) for (run, _), steps in zip(runs, counts, strict=True))


def _read_identifier(value: Any, *, name: str) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{32}", value):
        raise ValueError(f"Expected 32 hexadecimal digits, got {name}={value!r}.")
    return value


def check_relation(event: PrivacyEvent, relation: str) -> None:
    """Raise a ValueError if a relation does not allow the kind of an event."""
    if event.kind == "allocation" and relation == "replace_one":
        raise ValueError(
            'Expected a relation with a bound for kind="allocation", got neighboring_relation="replace_one". '
            'Record kind="shuffle", which claims no amplification.'
        )


def _write_entry(entry: LedgerEntry) -> dict[str, Any]:
    event = entry.event
    state = {
        "kind": event.kind,
        "noise_multiplier": event.noise_multiplier,
        "sample_rate": event.sample_rate,
        "reason": event.reason,
        "num_steps": entry.num_steps,
        "num_passes": entry.num_passes,
    }
    return state | dict.fromkeys(_extra_keys(event.kind), event.num_batches)


def _read_entry(entry: Any) -> LedgerEntry:
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    _check_keys(entry, _ENTRY_KEYS | _extra_keys(kind), name="entry")
    event = PrivacyEvent(
        entry["kind"], entry["noise_multiplier"], entry["sample_rate"], entry["reason"], entry.get("num_batches", 1)
    )
    num_steps = check_count(entry["num_steps"], name="num_steps", minimum=1)
    num_passes = check_count(entry["num_passes"], name="num_passes", minimum=int(event.has_passes))
    if num_passes and not event.has_passes:
        raise ValueError(f"Expected passes that fit kind={event.kind!r}, got num_passes={num_passes}.")
    check_passes(event, num_steps, num_passes)
    return LedgerEntry(event, num_steps, num_passes)


def _extra_keys(kind: Any) -> set[str]:
    """Return the additional keys of an entry; older kinds have none, so their entries keep their form."""
    return {"num_batches"} if kind in COUNTED else set()


def _check_keys(value: Any, keys: set[str], *, name: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected a dictionary, got {name} of type {type(value).__name__}.")
    if set(value) != keys:
        raise ValueError(f"Expected keys {sorted(keys)}, got {name} with keys {sorted(map(str, value))}.")


def begins(one: LedgerState, other: LedgerState) -> bool:
    """Return whether one history, perhaps with its last pass incomplete, is the beginning of another.

    Args:
        one: The shorter history.
        other: The history that may have grown out of it.

    Returns:
        True if lineage, relation, unit, resumed runs and every recorded step agree.
    """
    if (one.lineage, one.neighboring_relation, one.unit) != (other.lineage, other.neighboring_relation, other.unit):
        return False
    later, num_steps = other.resumed[len(one.resumed) :], sum(entry.num_steps for entry in one.entries)
    if other.resumed[: len(one.resumed)] != one.resumed or any(before < num_steps for _, before in later):
        return False
    finished, opened = (one.entries[:-1], one.entries[-1]) if one.pass_open else (one.entries, None)
    rest = list(other.entries)
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
        and rest[0].event.shares_pass(opened.event)
        and rest[0].event.noise_multiplier <= opened.event.noise_multiplier
        and rest[0].num_steps >= opened.num_steps
    )
