"""Histories: ledgers of earlier runs are found, joined, and carried by the parameters that they trained."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_dp.accounting import Ledger, PrivacyEvent
from lightning_dp.errors import PrivacyError
from lightning_dp.step import checkpoint as saved
from lightning_dp.step import history
from lightning_dp.step.history import carry, check_history, joined, note_checkpoint, note_values, read_history
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


def test_check_history_finds_trained_parameters() -> None:
    ledger, module = ledger_of(3), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    check_history(module, [], given=False)
    carry(module[1].parameters(), ledger)
    with pytest.raises(PrivacyError, match=r"'1\.weight' was trained by an earlier private run of 3 steps"):
        check_history(module, [Ledger().lineage], given=False)
    check_history(module, [ledger.lineage], given=False)
    check_history(module, [], given=True)


def test_check_history_ignores_ledgers_without_steps() -> None:
    module = nn.Linear(2, 2)
    carry(module.parameters(), Ledger())
    check_history(module, [], given=False)


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
    check_history(initial, [], given=False)
    with torch.no_grad():
        module.weight.add_(torch.rand(3, 3))
    note_values(module.parameters())
    copied = copy.deepcopy(module)
    with pytest.raises(PrivacyError, match="'weight' was trained by an earlier private run of 3 steps"):
        check_history(copied, [], given=False)
    check_history(copied, [ledger.lineage], given=False)
    check_history(initial, [], given=False)


def test_note_checkpoint_marks_a_loaded_module() -> None:
    state = make_state()
    state.record(state.plan.sigma(0))
    module = nn.Linear(2, 2)
    note_checkpoint(module, {"state_dict": {}})
    check_history(module, [], given=False)
    note_checkpoint(module, {saved.KEY: state.state_dict(global_step=1)})
    with pytest.raises(PrivacyError, match="earlier private run of 1 steps"):
        check_history(module, [], given=False)
