"""Histories: ledgers of earlier runs are found, joined, and carried by the parameters that they trained."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_dp.accounting import Ledger, PrivacyEvent
from lightning_dp.errors import PrivacyError
from lightning_dp.step import checkpoint as saved
from lightning_dp.step import history
from lightning_dp.step.earlier_runs import EarlierRuns
from lightning_dp.step.history import (
    carry,
    joined,
    note_checkpoint,
    note_values,
    of_first_rank,
    read_history,
)
from tests.step.rig import make_state

GAUSSIAN = PrivacyEvent(kind="gaussian", noise_multiplier=2.0)


def ledger_of(steps: int, relation: str = "add_or_remove_one") -> Ledger:
    ledger = Ledger(relation)
    ledger.record(GAUSSIAN, steps)
    return ledger


def test_read_history_takes_ledgers_strategies_and_files(tmp_path: Path) -> None:
    state = make_state()
    state.record(state.plan.sigma(0))
    torch.save({saved.KEY: state.state_dict(global_step=1)}, tmp_path / "a.ckpt")
    first = ledger_of(3)
    found = read_history([first, SimpleNamespace(ledger=ledger_of(2)), str(tmp_path / "a.ckpt"), tmp_path / "a.ckpt"])
    assert [ledger.num_steps for ledger in found] == [3, 2, 1]  # the file was given twice and counts once
    assert read_history(first) == [first]


@pytest.mark.parametrize("longer_first", [True, False])
def test_read_history_keeps_the_longer_ledger_of_a_run(longer_first: bool) -> None:
    short = ledger_of(2)
    long = short.copy()
    long.record(GAUSSIAN)
    given = [long, short] if longer_first else [short, long]
    assert [ledger.num_steps for ledger in read_history(given)] == [3]


def test_read_history_refuses_what_holds_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Expected history to hold ledgers or paths of checkpoints, got int"):
        read_history([3])
    torch.save({"state_dict": {}}, tmp_path / "public.ckpt")
    with pytest.raises(PrivacyError, match=r"got '.*public\.ckpt' without one"):
        read_history(tmp_path / "public.ckpt")
    with pytest.raises(FileNotFoundError, match=r"Expected a checkpoint in history, got '.*lost\.ckpt', which is no"):
        read_history(str(tmp_path / "lost.ckpt"))


def test_joined_ledgers_hold_the_releases_of_all() -> None:
    shuffled = Ledger()
    shuffled.record(PrivacyEvent(kind="shuffle", noise_multiplier=1.0), 4)
    total = joined([ledger_of(3), shuffled, ledger_of(2)], Ledger())
    assert total.num_steps == 9
    assert sorted(total.mechanisms().values()) == [1, 5]  # one pass, five releases
    assert joined([], Ledger("replace_one")).num_steps == 0


def test_joined_refuses_another_relation() -> None:
    with pytest.raises(PrivacyError, match="under neighboring_relation='replace_one', got 'add_or_remove_one'"):
        joined([ledger_of(1)], Ledger("replace_one"))


def counted(module: nn.Module, own: Ledger | None = None) -> int:
    """The steps of a new run's ledger, or of another one, once earlier runs on the module are counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EarlierRuns().count(module, own or Ledger()).num_steps


def test_earlier_runs_on_parameters_are_counted() -> None:
    ledger, module = ledger_of(3), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert counted(module) == 0
    carry(module[1].parameters(), ledger)
    with pytest.warns(UserWarning, match=r"'1\.weight' was trained by an earlier private run: its 3 steps count"):
        total = EarlierRuns().count(module, ledger_of(2))
    assert total.num_steps == 5
    assert counted(module, total) == 5
    assert counted(module, ledger) == 3
    earlier = EarlierRuns()
    with pytest.raises(PrivacyError, match=r"'1\.weight' was trained by an earlier private run of 3 steps"):
        earlier.check(module, Ledger())
    earlier.check(module, total)
    earlier.given = []
    earlier.check(module, Ledger())
    assert earlier.count(module, Ledger()).num_steps == 0


def test_a_history_that_was_given_too_early_counts() -> None:
    ledger, module = ledger_of(3), nn.Linear(2, 2)
    state = make_state()
    state.begin_after([ledger])
    ledger.record(GAUSSIAN, 4)
    for _ in range(2):
        state.count_earlier_runs(module)
        assert state.ledger.num_steps == 7


def test_a_run_that_counts_another_is_added_once() -> None:
    """Steps that the earlier run took after it was counted are missing, and so all of it counts again."""
    module, first, second = nn.Linear(2, 2), ledger_of(3), joined([early := ledger_of(2)], Ledger())
    for ledger in (early, second):
        carry(module.parameters(), ledger)
    assert counted(module) == 2
    carry(module.parameters(), first)
    assert counted(module) == 5
    early.record(early.entries[0].event)
    assert counted(module) == 8


@pytest.mark.parametrize("how", ["resumed", "deepcopy", "pickle"])
def test_runs_that_begin_as_one_are_added_up(how: str) -> None:
    """Two runs from one checkpoint, or from copies of one strategy: their ledgers are equal in every step."""
    state, module = make_state(), nn.Linear(2, 2)
    state.record(1.0)
    checkpoint, kept = {saved.KEY: state.state_dict(global_step=0), "global_step": 0}, pickle.dumps(state)
    runs = []
    for _ in range(2):
        run = make_state() if how == "resumed" else copy.deepcopy(state) if how == "deepcopy" else pickle.loads(kept)
        if how == "resumed":
            run.load(checkpoint, allow_public=False, one_step_a_batch=False)
            run.plan = state.plan
        run.begin_step()
        run.record(1.0)
        runs.append(run)
    one, other = (run.ledger for run in runs)
    assert one.entries == other.entries
    assert joined(read_history([one, other]), Ledger()).num_steps == 4
    carry(module.parameters(), one)
    assert [counted(module, ledger) for ledger in (one, other)] == [2, 4]
    if how == "resumed":
        assert read_history([state.ledger, one]) == [one]  # one run and its beginning count once
        assert read_history([Ledger.from_state_dict(one.state_dict()), one]) == [one]
        theirs = {saved.KEY: runs[0].state_dict(global_step=0), "global_step": 0}
        with pytest.raises(PrivacyError, match="Expected a checkpoint of this strategy's own run"):
            runs[1].load(theirs, allow_public=False, one_step_a_batch=False)


def test_only_a_resumed_run_holds_the_steps_of_another_ledger() -> None:
    """Ranks begin ledgers of their own, and a checkpoint holds that of the first one; equal runs are others."""
    module = nn.Linear(2, 2)
    carry(module.parameters(), ledger_of(3))
    assert counted(module, ledger_of(4).resumed()) == 4
    assert counted(module, ledger_of(2).resumed()) == 5
    assert counted(module, ledger_of(4)) == 7


def test_the_ledger_of_rank_0_holds_what_this_rank_counted() -> None:
    module, earlier = nn.Linear(2, 2), ledger_of(3)
    carry(module.parameters(), earlier)
    own, other = (joined([earlier], Ledger()) for _ in range(2))
    assert counted(module, of_first_rank(own, other.state_dict())) == 3
    fewer = ledger_of(1)
    assert counted(module, of_first_rank(own, fewer.state_dict())) == 4


def test_ledgers_without_steps_are_not_counted() -> None:
    module = nn.Linear(2, 2)
    carry(module.parameters(), Ledger())
    assert counted(module) == 0


def test_parameters_are_forgotten_when_they_are_freed() -> None:
    gc.collect()
    before, module = len(history._carried), nn.Linear(2, 2)
    carry(module.parameters(), ledger_of(1))
    assert len(history._carried) == before + 2
    del module
    gc.collect()
    assert len(history._carried) <= before  # others may have been freed with them


def test_copies_of_trained_weights_are_known_by_their_values() -> None:
    """Values that no step has moved are not: others may begin with the same."""
    ledger, module = ledger_of(3), nn.Linear(3, 3)
    initial = copy.deepcopy(module)
    carry(module.parameters(), ledger)
    note_values(module.parameters())
    assert counted(initial) == 0
    with torch.no_grad():
        module.weight.add_(torch.rand(3, 3))
    note_values(module.parameters())
    copied = copy.deepcopy(module)
    assert counted(copied) == 3
    assert counted(copied, ledger) == 3
    assert counted(initial) == 0


def test_note_checkpoint_marks_a_loaded_module() -> None:
    state = make_state()
    state.record(state.plan.sigma(0))
    module = nn.Linear(2, 2)
    note_checkpoint(module, {"state_dict": {}})
    assert counted(module) == 0
    note_checkpoint(module, {saved.KEY: state.state_dict(global_step=1)})
    assert counted(module) == 1
