"""History: the privacy spent by earlier runs on the same data, and the parameters that they trained."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.accounting import Ledger
from lightning_dp.errors import PrivacyError
from lightning_dp.sandbox.snapshot import few_values
from lightning_dp.step import checkpoint as saved
from lightning_dp.system.local import is_sharded, local_part

History = Ledger | str | os.PathLike[str] | Sequence[Any] | None
"""Type of the argument ``history``."""

Lineages = dict[str, Ledger]
"""Ledgers by the last of their runs."""

_PLACES, _FEWEST = 16, 4  # values that are compared, and how many of them must differ to tell a copy

#: id of a parameter -> the parameter (weakly), the ledgers of the runs that have trained it, and its values before the
#: first.
_carried: dict[int, tuple[Any, Lineages, Any]] = {}
#: values of a parameter at the end of a run or in a checkpoint -> the ledgers of the runs that have trained it
_values: dict[Any, Lineages] = {}
#: a run -> the runs whose steps its ledger holds, with the numbers of these steps
_counted: dict[str, dict[str, int]] = {}
#: modules whose weights were loaded since the last look, while a run trains them
_loaded: weakref.WeakSet[nn.Module] = weakref.WeakSet()
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
    if not os.path.exists(file):
        raise FileNotFoundError(f"Expected a checkpoint in history, got {file!r}, which is no file. Check the path.")
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
    counted = _counted.setdefault(_run_of(total), {})
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
        for run, steps in _held_by([ledger]).items():
            counted[run] = max(steps, counted.get(run, 0))
    return total


def apart(own: Ledger) -> Ledger:
    """Return the ledger of a new run that has spent what another ledger holds, as that of a copied strategy."""
    return joined([own], own)


def _run_of(ledger: Ledger) -> str:
    return next(reversed(ledger.runs))


def _held_by(ledgers: Iterable[Ledger]) -> dict[str, int]:
    """Return the runs whose steps ledgers hold, and the numbers of these steps."""
    held: dict[str, int] = {}
    for run, steps in (each for ledger in ledgers for each in ledger.runs.items()):
        for other, count in ((run, steps), *_counted.get(run, {}).items()):
            held[other] = max(count, held.get(other, 0))
    return held


def of_first_rank(own: Ledger, state: dict[str, Any]) -> Ledger:
    """Return the ledger of rank 0; it holds the earlier runs that this rank's ledger holds if their steps are the same.

    Args:
        own: this rank's ledger.
        state: of the ledger of rank 0.
    """
    ledger = Ledger.from_state_dict(state)
    if own.entries == ledger.entries:
        _counted[_run_of(ledger)] = _held_by([own])
    return ledger


def carry(parameters: Iterable[nn.Parameter], ledger: Ledger, *, loaded: bool = False) -> None:
    """Record that a private run trains these parameters, before their values change, or that it has written them."""
    for parameter in parameters:
        key = id(parameter)
        if key not in _carried:
            weakref.finalize(parameter, _carried.pop, key, None)
            _carried[key] = (weakref.ref(parameter), {}, _print_of(parameter))
        ledgers = _carried[key][1]
        for run, other in list(ledgers.items()):  # what a run did after its checkpoint is overwritten by loading that
            if run in ledger.runs or (loaded and other.lineage == ledger.lineage):
                del ledgers[run]
        ledgers[_run_of(ledger)] = ledger


def note_values(parameters: Iterable[nn.Parameter]) -> None:
    """Record the values of privately trained parameters, so that copies of them are recognised."""
    for parameter in parameters:
        reference, ledgers, before = _carried.get(id(parameter), (None, {}, None))
        now = _print_of(parameter)
        if reference is not None and now is not None and now != before:
            _values.setdefault(now, {}).update(ledgers)


def _note_load(module: nn.Module, keys: Any) -> None:
    _loaded.add(module)


class Trained:
    """The module that a run trains: its parameters carry the ledger, and weights that are loaded into it are looked at.

    Args:
        module: the user's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.released: dict[int, Mapping[str, nn.Parameter]] = {}
        """Parameters by index of the optimizer, as of its last release."""
        self._hook: Any = module.register_load_state_dict_post_hook(_note_load)  # type: ignore[no-untyped-call]

    def carry(self, optimizer: int, parameters: Mapping[str, nn.Parameter], ledger: Ledger) -> None:
        """Record that an optimizer trains these parameters, before their values change; more may train later."""
        if self.released.get(optimizer) is not parameters:
            carry(parameters.values(), ledger)
            self.released[optimizer] = parameters

    def was_loaded(self) -> bool:
        """Tell whether weights were loaded since the last call."""
        found = self._module in _loaded
        _loaded.discard(self._module)
        return found

    def close(self) -> None:
        """Record the trained values, and look at the module no more."""
        note_values(self._module.parameters())
        self._hook.remove()


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
    place, *_ = parameter.device_mesh.get_coordinate()  # also known where the group of processes has ended
    first = min(each * place, parameter.shape[0])
    return first, first + num


def _ledgers_of(parameter: Tensor) -> Lineages:
    """Return the ledgers of the runs that have trained the parameter of which another one is a copy."""
    found = dict(_values.get(_print_of(parameter), {}))
    for rows in () if is_sharded(parameter) else _parts.get(tuple(parameter.shape), ()):
        found |= _values.get(_print_of(parameter, rows), {})
    return found


def note_checkpoint(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Record that the parameters of a module come from a checkpoint, if a private run wrote it."""
    state = checkpoint.get(saved.KEY)
    if isinstance(state, dict) and "ledger" in state:
        carry(module.parameters(), Ledger.from_state_dict(state["ledger"]), loaded=True)


def uncounted(module: nn.Module, own: Ledger) -> list[tuple[str, Ledger]]:
    """Return the ledgers of earlier private runs on a module's parameters that a ledger does not hold.

    Args:
        module: the module to be trained; a parameter may be a copy of one that was trained.
        own: the ledger of the run. Each of several processes may have begun one of its own, and a checkpoint holds
            that of the first process only.

    Returns:
        Names of parameters, and the ledgers of runs that trained them.
    """
    found: dict[str, tuple[str, Ledger]] = {}
    live = [reference() for reference, *_ in _carried.values()]
    note_values(parameter for parameter in live if parameter is not None)  # copies may be of runs that go on
    for name, parameter in module.named_parameters():
        reference, ledgers, _ = _carried.get(id(parameter), (None, {}, None))
        ledgers = ledgers if reference is not None and reference() is parameter else {}
        for run, ledger in (ledgers | _ledgers_of(parameter)).items():
            of_rank = len(own.runs) > 1 and ledger.lineage != own.lineage and ledger.has_same_beginning(own)
            if run not in own.runs and not of_rank:
                found.setdefault(run, (name, ledger))
    others = {run: [own, *(other for key, (_, other) in found.items() if key != run)] for run in found}
    return [
        (name, ledger) for run, (name, ledger) in found.items() if ledger.num_steps > _held_by(others[run]).get(run, 0)
    ]
