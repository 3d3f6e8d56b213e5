"""Passes in a ledger: what they cost, and planned ones."""

import pickle

import pytest

from lightning_dp.accounting import Ledger, LedgerEntry, Mechanism, PrivacyEvent
from tests.accounting.test_ledger import LOUD, LOW_TEN, QUIET, TEN, A, B


def test_pass_costs_one_gaussian_with_its_smallest_multiplier():
    ledger = Ledger()
    ledger.record(LOUD, 5)
    ledger.record(QUIET)
    ledger.record(LOUD, 4)
    assert ledger.mechanisms() == {Mechanism(1.0, 1.0): 1}
    assert ledger.num_steps == 10
    ledger.start_pass()
    ledger.record(LOUD, 10)
    assert ledger.mechanisms() == {Mechanism(1.0, 1.0): 1, Mechanism(1.0, 2.0): 1}


def test_passes_of_one_multiplier_are_one_run():
    ledger = Ledger()
    for _ in range(1000):
        ledger.start_pass()
        ledger.record(LOUD, 7)
        ledger.record(LOUD, 3)
    assert len(ledger.entries) == 2  # the finished passes and the open one
    assert ledger.mechanisms() == {Mechanism(1.0, 2.0): 1000}
    assert ledger.num_steps == 10_000
    ledger.start_pass()
    assert ledger.entries == (LedgerEntry(LOUD, 10_000, 1000),)


def test_step_of_another_kind_ends_the_pass():
    ledger = Ledger()
    ledger.record(LOUD)
    ledger.record(A)
    ledger.record(LOUD)
    assert ledger.mechanisms() == {Mechanism(1.0, 2.0): 2, Mechanism(0.01, 1.1): 1}


def test_allocation_pass_costs_its_smallest_multiplier():
    ledger = Ledger()
    ledger.record(TEN, 5)
    ledger.record(LOW_TEN)
    ledger.record(TEN, 4)
    assert ledger.mechanisms() == {Mechanism(0.1, 1.0, 10): 1}
    ledger.start_pass()
    ledger.record(TEN, 3)  # cut short: a whole pass
    ledger.start_pass()
    ledger.record(TEN, 10)
    assert ledger.mechanisms() == {Mechanism(0.1, 1.0, 10): 1, Mechanism(0.1, 2.0, 10): 2}
    assert ledger.num_steps == 23


@pytest.mark.parametrize("chunks", [[45], [1] * 45, [7, 30, 8], [10, 10, 25]])
def test_full_allocation_pass_is_followed_by_another(chunks):
    ledger = Ledger()
    for count in chunks:
        ledger.record(TEN, count)
    assert ledger.mechanisms() == {Mechanism(0.1, 2.0, 10): 5}
    assert ledger.entries == (LedgerEntry(TEN, 40, 4), LedgerEntry(TEN, 5, 1))


def test_full_pass_keeps_its_multiplier_when_the_next_is_lower():
    ledger = Ledger()
    ledger.record(TEN, 10)
    ledger.record(LOW_TEN)
    assert ledger.entries == (LedgerEntry(TEN, 10, 1), LedgerEntry(LOW_TEN, 1, 1))


def test_amend_last_in_a_full_pass_stays_in_it():
    ledger = Ledger()
    ledger.record(TEN, 10)
    ledger.amend_last(LOW_TEN)
    assert ledger.entries == (LedgerEntry(LOW_TEN, 10, 1),)
    ledger.record(TEN)
    ledger.amend_last(LOW_TEN)
    assert ledger.mechanisms() == {Mechanism(0.1, 1.0, 10): 2}


@pytest.mark.parametrize("other", [LOUD, PrivacyEvent.allocation(noise_multiplier=2.0, num_batches=11), A])
def test_step_of_another_pass_ends_the_allocation_pass(other):
    ledger = Ledger()
    for event in (TEN, other, TEN):
        ledger.record(event)
    assert ledger.mechanisms() == {Mechanism(0.1, 2.0, 10): 2, other.mechanism: 1}
    ledger.amend_last(other)
    assert ledger.mechanisms() == {Mechanism(0.1, 2.0, 10): 1, other.mechanism: 2}


def test_pass_of_one_batch_is_a_gaussian_in_the_ledger():
    ledger = Ledger()
    ledger.record(PrivacyEvent.allocation(noise_multiplier=2.0, num_batches=1), 7)
    assert ledger.mechanisms() == {PrivacyEvent.gaussian(noise_multiplier=2.0).mechanism: 7}


@pytest.mark.parametrize(
    ("runs", "paid"),
    [
        ([(TEN, 10)], 2),
        ([(TEN, 25)], 4),
        ([(TEN, 25, 25)], 26),
        ([(TEN, 6, 0)], 1),
        ([(TEN, 7, 0)], 2),
        ([(TEN, 30, 3), (TEN, 3, 0)], 5),
    ],
)
def test_extended_counts_planned_allocation_passes(runs, paid):
    ledger = Ledger()
    ledger.record(TEN, 4)
    longer = ledger.extended(runs)
    assert longer.mechanisms() == {Mechanism(0.1, 2.0, 10): paid}
    assert longer.num_steps == 4 + sum(run[1] for run in runs)
    assert Ledger.from_state_dict(longer.state_dict()).state_dict() == longer.state_dict()


@pytest.mark.parametrize("run", [(A, 3, 2), (LOUD, 3, 5), (TEN, 0, 1)])
def test_refused_run_leaves_the_ledger_as_it_was(run):
    ledger = Ledger()
    ledger.record(LOUD, 4)
    before = ledger.state_dict()
    with pytest.raises(ValueError, match="Expected"):
        ledger.record_run(run)
    assert ledger.state_dict() == before


def test_copies_grow_apart():
    ledger = Ledger()
    ledger.record(LOUD, 4)
    before, other = ledger.state_dict(), ledger.copy()
    other.record(LOUD, 4)
    assert ledger.state_dict() == before
    assert pickle.loads(pickle.dumps(other)).state_dict() == other.state_dict() != before


def test_extended_leaves_the_ledger_alone_and_keeps_its_lineage():
    ledger = Ledger()
    ledger.record(A, 2)
    longer = ledger.extended([(A, 3), (B, 1)])
    assert ledger.entries == (LedgerEntry(A, 2),)
    assert longer.entries == (LedgerEntry(A, 5), LedgerEntry(B, 1))
    assert longer.lineage == ledger.lineage
    assert Ledger().lineage != ledger.lineage


@pytest.mark.parametrize(
    ("runs", "paid"),
    [
        ([(LOUD, 10)], 2),
        ([(LOUD, 10, 0)], 1),
        ([(LOUD, 10, 1)], 2),
        ([(LOUD, 10, 5)], 6),
        ([(LOUD, 10), (LOUD, 10)], 3),
        ([(LOUD, 10, 5), (LOUD, 3, 0)], 6),
    ],
)
def test_extended_counts_planned_passes(runs, paid):
    ledger = Ledger()
    ledger.record(LOUD, 4)
    longer = ledger.extended(runs)
    assert longer.mechanisms() == {Mechanism(1.0, 2.0): paid}
    assert longer.num_steps == 4 + sum(run[1] for run in runs)


def test_extended_pass_costs_its_smallest_multiplier():
    assert Ledger().extended([(LOUD, 10, 5), (QUIET, 3, 0)]).mechanisms() == {
        Mechanism(1.0, 2.0): 4,
        Mechanism(1.0, 1.0): 1,
    }


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ((A,), "got 1 items"),
        ((A, 1, 1), "shuffle"),
        ((LOUD, 1, 2), "passes <= steps"),
        ((LOUD, 1, -1), "passes=-1"),
        ((TEN, 11, 1), "steps <= passes x num_batches, got steps=11, passes=1 and num_batches=10"),
        ((A, 0), "steps=0"),
    ],
)
def test_extended_refuses_malformed_runs(run, message):
    with pytest.raises(ValueError, match=message):
        Ledger().extended([run])
