"""``lightning-dp card``: the privacy statement of a checkpoint, from its ledger and plan."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_dp.accounting import Ledger, make_accountant
from lightning_dp.cli import output
from lightning_dp.datalens import statement as datalens_statement
from lightning_dp.datalens.plan import DataLensPlan
from lightning_dp.reporting.card import privacy_card
from lightning_dp.reporting.card_markdown import to_markdown
from lightning_dp.reporting.notes import RunNotes
from lightning_dp.reporting.statement import privacy_statement, stated_plan
from lightning_dp.step import checkpoint as saved
from lightning_dp.step.history import joined, read_history


def card(options: argparse.Namespace) -> int:
    """Print the privacy statement or the whole card of one run, or of several runs on the same data; return 0."""
    checkpoints = [load(path) for path in options.checkpoint]
    state = checkpoints[-1][saved.KEY]
    ledger, notes = _added_up([each[saved.KEY]["ledger"] for each in checkpoints]), saved.load_notes(checkpoints[-1])
    if ledger.num_steps == 0:
        raise ValueError(
            "Expected a checkpoint of a private run that has begun, got no steps recorded. Take a later one."
        )
    plan = state["plan"]
    if not isinstance(plan, dict):
        raise ValueError(
            "Expected the plan of the run in the checkpoint, got none. Take one that was saved during or after fit."
        )
    if "num_teachers" in plan:
        return _datalens(plan, ledger, notes, options)
    stated = stated_plan(plan)
    accountant = make_accountant(stated.accountant)
    if options.json or options.markdown:
        whole = privacy_card(stated, ledger, accountant, notes=notes)
        write: Callable[[Any], None] = output.write_json if options.json else output.write
        write(whole if options.json else to_markdown(whole).rstrip())
        return 0
    output.write(privacy_statement(stated, ledger, accountant, notes))
    return 0


def _added_up(states: list[Any]) -> Ledger:
    """Return one ledger of all runs; checkpoints of the same run count once."""
    ledgers = read_history([Ledger.from_state_dict(state) for state in states])
    return ledgers[0] if len(ledgers) == 1 else joined(ledgers, ledgers[0])


def load(path: str) -> dict[str, Any]:
    """Read a checkpoint of a private run without executing any code in it.

    Raises:
        ValueError: the file cannot be read, or has no ledger or plan.
    """
    if not Path(path).is_file():
        raise ValueError(f"Expected a checkpoint file, got {path!r}, which does not exist. Check the path.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"Expected a whole file of torch.save, got {path!r}, which is none. Check the path.")
    try:
        # weights are memory-mapped, because only ledger and plan are read
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Expected a checkpoint of plain values (torch.load with weights_only=True), got {path!r}: {first} Save it "
            "without objects among its hyper-parameters and callback states."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(saved.KEY), dict):
        raise ValueError(
            f"Expected a checkpoint with a privacy ledger, got {path!r} without. It was not written under a private "
            "strategy."
        )
    if not {"ledger", "plan"} <= checkpoint[saved.KEY].keys():
        raise ValueError(f"Expected ledger and plan in the checkpoint, got {path!r} with less. Use an intact one.")
    return checkpoint


def _datalens(plan: dict[str, Any], ledger: Ledger, notes: RunNotes, options: argparse.Namespace) -> int:
    if options.json or options.markdown:
        raise ValueError(
            "Expected a checkpoint of DPStrategy for --json and --markdown, got one of DataLens. Leave them out."
        )
    names = DataLensPlan.__dataclass_fields__.keys()
    known = DataLensPlan(**{name: value for name, value in plan.items() if name in names})
    accountant = make_accountant(known.accountant)
    output.write(datalens_statement.privacy_statement(known, ledger, accountant, seeded=notes.seeded))
    return 0
