"""History: the privacy spent by earlier runs on the same data, and the parameters that they trained."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.accounting import Ledger
from lightning_dp.errors import PrivacyError
from lightning_dp.step import checkpoint as saved
from lightning_dp.step.local import is_sharded, local_part
from lightning_dp.step.snapshot import few_values

History = Ledger | str | os.PathLike[str] | Sequence[Any] | None
"""Type of the argument ``history``."""

Lineages = dict[str, Ledger]

_PLACES, _FEWEST = 16, 4  # values that are compared, and how many of them must differ to tell a copy

#: id of a parameter -> the parameter (weakly), the ledgers of the runs that have trained it, and its values before the
#: first.
_carried: dict[int, tuple[Any, Lineages, Any]] = {}
#: values of a parameter at the end of a run or in a checkpoint -> the ledgers of the runs that have trained it
_values: dict[Any, Lineages] = {}
#: shape of a sharded parameter -> first and last row of the parts whose values are known
_parts: dict[Any, set[tuple[int, int]]] = {}


def read_history(history: Any) -> list[Ledger]:
    """Return the ledgers of earlier runs; keep only the longer of two ledgers of the same run.

    Args:
        history: a ``Ledger``, anything with a ``ledger`` (a strategy), the path of a checkpoint, or a list of these.

    Raises:
        TypeError: something else.
        PrivacyError: a checkpoint without a readable ledger.
    """
    given = history if isinstance(history, Sequence) and not isinstance(history, str) else [history]
    ledgers: list[Ledger] = []
    for item in given:
        ledger = item if isinstance(item, Ledger) else getattr(item, "ledger", None)
        if not isinstance(ledger, Ledger):
            ledger = _ledger_of(item)
        ledgers = [known for known in ledgers if not known.is_prefix_of(ledger)]
        if not any(ledger.is_prefix_of(known) for known in ledgers):
            ledgers.append(ledger)
    return ledgers


def _ledger_of(path: Any) -> Ledger:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"Expected history to hold ledgers or paths of checkpoints, got {type(path).__name__}. Pass "
            "strategy.ledger, 'last.ckpt', or a list of them."
        )
    file = os.path.join(path, "meta.pt") if os.path.isdir(path) else path  # a folder is a sharded checkpoint
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or saved.KEY not in checkpoint:
        raise PrivacyError(
            f"Expected a checkpoint with a privacy ledger in history, got {os.fspath(path)!r} without one. What its "
            "weights have spent is unknown: pass a checkpoint that was written under a private strategy."
        )
    return Ledger.from_state_dict(checkpoint[saved.KEY]["ledger"])


def joined(ledgers: Iterable[Ledger], own: Ledger) -> Ledger:
    """Join the ledgers of all runs into one, because their costs compose.

    Args:
        ledgers: of earlier runs on the same data.
        own: of the current run; its relation and unit apply to the result.

    Raises:
        PrivacyError: a ledger of another relation or unit.
    """
    total = Ledger(own.neighboring_relation, own.unit)
    for ledger in ledgers:
        if ledger.neighboring_relation != own.neighboring_relation:
            raise PrivacyError(
                f"Expected a history under neighboring_relation={own.neighboring_relation!r}, got "
                f"{ledger.neighboring_relation!r}. One epsilon cannot state two relations: pass the same relation to "
                "all runs."
            )
        if ledger.unit != own.unit:
            raise PrivacyError(
                f"Expected a history that protects each {own.unit}, got one that protects each {ledger.unit}. One "
                "epsilon cannot state two units: pass the same unit to all runs."
            )
        total = total.extended(
            (entry.event, entry.num_steps, entry.num_passes) if entry.num_passes else (entry.event, entry.num_steps)
            for entry in ledger.entries
        )
        total.start_pass()
    return total


def carry(parameters: Iterable[nn.Parameter], ledger: Ledger) -> None:
    """Record that a private run trains these parameters, before their values change."""
    for parameter in parameters:
        key = id(parameter)
        if key not in _carried:
            weakref.finalize(parameter, _carried.pop, key, None)
            _carried[key] = (weakref.ref(parameter), {}, _print_of(parameter))
        _carried[key][1][ledger.lineage] = ledger


def note_values(parameters: Iterable[nn.Parameter]) -> None:
    """Record the values of privately trained parameters, so that copies of them are recognised."""
    for parameter in parameters:
        reference, ledgers, before = _carried.get(id(parameter), (None, {}, None))
        now = _print_of(parameter)
        if reference is not None and now is not None and now != before:
            _values.setdefault(now, {}).update(ledgers)


def _print_of(parameter: Tensor, rows: tuple[int, int] | None = None) -> Any:
    """Return a few values by which copies of a parameter are recognised; None if other parameters may share them.

    Of a sharded parameter, the values are those of this process's rows.

    Args:
        parameter: whole or sharded.
        rows: first and last row to take the values of; default: all that this process holds.
    """
    value, shape = local_part(parameter).detach(), tuple(parameter.shape)
    if rows is not None:
        value = value[slice(*rows)]
    elif is_sharded(parameter):
        rows = _rows_of(parameter, len(value))
        _parts.setdefault(shape, set()).add(rows)
    if value.numel() < _FEWEST or type(value) is not Tensor or value.is_meta:
        return None
    values = tuple(few_values(value, _PLACES).tolist())
    return (shape, rows, values) if len(set(values)) >= _FEWEST else None


def _rows_of(parameter: Any, num: int) -> tuple[int, int]:
    """Return the first and last row of this process's part of a parameter that is sharded along its first axis."""
    each = -(-parameter.shape[0] // parameter.device_mesh.size())
    first = min(each * parameter.device_mesh.get_local_rank(), parameter.shape[0])
    return first, first + num


def _ledgers_of(parameter: Tensor) -> Lineages:
    """Return the ledgers of the runs that have trained the parameter of which another one is a copy."""
    found = dict(_values.get(_print_of(parameter), {}))
    for rows in () if is_sharded(parameter) else _parts.get(tuple(parameter.shape), ()):
        found |= _values.get(_print_of(parameter, rows), {})
    return found


def note_checkpoint(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Record that the parameters of a module come from a checkpoint, if a private run wrote it."""
    state = checkpoint.get(saved.KEY)
    if isinstance(state, dict) and "ledger" in state:
        carry(module.parameters(), Ledger.from_state_dict(state["ledger"]))


def check_history(module: nn.Module, known: Iterable[str], *, given: bool, resumed: Ledger | None = None) -> None:
    """Check that the ledger counts the privacy that earlier runs spent on a module's parameters.

    Args:
        module: the module to be trained.
        known: lineages of the ledgers that the run counts.
        resumed: ledger of the resumed run. Each of several processes began a ledger of its own, and the checkpoint
            holds the ledger of the first process only.
        given: whether the user passed ``history``, perhaps empty; if so, nothing is checked.

    Raises:
        PrivacyError: a parameter, or the one that it is a copy of, was trained by a private run whose ledger is not
            counted.
    """
    if given:
        return
    lineages = set(known)
    for name, parameter in module.named_parameters():
        reference, ledgers, _ = _carried.get(id(parameter), (None, {}, None))
        if reference is None or reference() is not parameter:
            ledgers = _ledgers_of(parameter)
        missing = [
            ledger
            for lineage, ledger in ledgers.items()
            if lineage not in lineages
            and ledger.num_steps
            and not (resumed is not None and ledger.has_same_beginning(resumed))
        ]
        if missing:
            raise PrivacyError(
                f"{name!r} was trained by an earlier private run of {missing[0].num_steps} steps, which this strategy "
                "would not count, so epsilon would be understated. Pass DPStrategy(history=earlier.ledger) or "
                "history='its.ckpt' to add it, or history=[] if the two runs have no record in common."
            )
