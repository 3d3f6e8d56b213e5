import json
import math

import numpy as np
import pytest

from lightning_dp.accounting import Ledger, LedgerEntry, Mechanism, PrivacyEvent
from lightning_dp.errors import PrivacyError
from tests.cases import each

A = PrivacyEvent.poisson(noise_multiplier=1.1, sample_rate=0.01)
B = PrivacyEvent.poisson(noise_multiplier=1.0, sample_rate=0.01)
LOUD = PrivacyEvent.shuffle(noise_multiplier=2.0)
QUIET = PrivacyEvent.shuffle(noise_multiplier=1.0)
TEN = PrivacyEvent.allocation(noise_multiplier=2.0, num_batches=10)
LOW_TEN = PrivacyEvent.allocation(noise_multiplier=1.0, num_batches=10)


@each(
    "arguments, message",
    [
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1"),
        ({"noise_multiplier": math.inf}, "noise_multiplier=inf"),
        ({"sample_rate": math.nan}, "sample_rate=nan"),
        ({"sample_rate": 1.1}, "sample_rate=1.1"),
        ({"sample_rate": -0.1}, "sample_rate=-0.1"),
        ({"kind": "uniform"}, "Expected kind"),
        ({"kind": "gaussian", "sample_rate": 0.5}, "sample_rate=1"),
        ({"kind": "shuffle", "sample_rate": 0.5}, "sample_rate=1"),
        ({"kind": "non_private", "sample_rate": 1.0}, "noise_multiplier=0"),
        ({"reason": "because"}, "non_private"),
        ({"num_batches": 2}, "num_batches=1 for kind='poisson', got num_batches=2"),
        ({"kind": "allocation", "sample_rate": 0.1}, "sample_rate=1"),
        ({"kind": "allocation", "sample_rate": 1.0, "num_batches": 0}, "integer >= 1, got num_batches=0"),
        ({"kind": "allocation", "sample_rate": 1.0, "num_batches": 2.0}, "integer >= 1, got num_batches=2.0"),
    ],
)
def test_event_refuses_fields_out_of_range(arguments, message):
    fields = {"kind": "poisson", "noise_multiplier": 1.0, "sample_rate": 0.5} | arguments
    with pytest.raises(ValueError, match=message):
        PrivacyEvent(**fields)


def test_event_refuses_what_is_not_a_number():
    with pytest.raises(TypeError, match="noise_multiplier='1'"):
        PrivacyEvent("gaussian", "1")
    with pytest.raises(TypeError, match="noise_multiplier=True"):
        PrivacyEvent("gaussian", True)
    assert type(PrivacyEvent("gaussian", np.float32(2)).noise_multiplier) is float


def test_record_merges_equal_steps_only():
    ledger = Ledger()
    for _ in range(3):
        ledger.record(A)
    ledger.record(B, 2)
    ledger.record(A)
    assert ledger.entries == (LedgerEntry(A, 3), LedgerEntry(B, 2), LedgerEntry(A, 1))
    assert ledger.num_steps == 6
    assert ledger.mechanisms() == {Mechanism(0.01, 1.1): 4, Mechanism(0.01, 1.0): 2}


def test_many_steps_stay_one_entry():
    ledger = Ledger()
    for _ in range(100_000):
        ledger.record(A)
    assert (len(ledger.entries), ledger.num_steps) == (1, 100_000)
    assert len(json.dumps(ledger.state_dict())) < 500


@pytest.mark.parametrize("count", [0, -1, 1.0, True, None])
def test_record_refuses_counts_that_are_no_positive_integer(count):
    with pytest.raises(ValueError, match="integer >= 1, got count"):
        Ledger().record(A, count)


def test_record_refuses_what_is_no_event():
    with pytest.raises(TypeError, match="PrivacyEvent, got str"):
        Ledger().record("poisson")


def test_amend_last_exchanges_exactly_one_step():
    ledger = Ledger()
    ledger.record(A, 5)
    ledger.amend_last(B)
    assert ledger.entries == (LedgerEntry(A, 4), LedgerEntry(B, 1))
    ledger.amend_last(A)
    assert ledger.entries == (LedgerEntry(A, 5),)


def test_amend_last_refuses_an_empty_ledger():
    with pytest.raises(PrivacyError, match="empty ledger"):
        Ledger().amend_last(A)


def test_amend_last_in_a_pass_never_becomes_cheaper():
    ledger = Ledger()
    ledger.record(LOUD, 3)
    ledger.amend_last(QUIET)
    assert ledger.entries == (LedgerEntry(QUIET, 3, 1),)
    ledger.amend_last(LOUD)  # whether the smallest multiplier was the exchanged step's is not kept
    assert ledger.entries == (LedgerEntry(QUIET, 3, 1),)


def test_prefix_knows_continuations_from_other_histories():
    ledger = Ledger()
    ledger.record(A, 3)
    assert ledger.is_prefix_of(ledger)
    assert ledger.is_prefix_of(ledger.extended([(A, 2), (B, 1)]))
    assert not ledger.extended([(A, 1)]).is_prefix_of(ledger)
    assert not ledger.extended([(B, 1)]).is_prefix_of(ledger.extended([(A, 1)]))
    stranger = Ledger()
    stranger.record(A, 3)
    assert not ledger.is_prefix_of(stranger)


def test_prefix_with_passes():
    ledger = Ledger()
    ledger.record(LOUD, 3)
    assert ledger.is_prefix_of(ledger.extended([(LOUD, 2, 0), (LOUD, 5)]))
    assert ledger.is_prefix_of(ledger.extended([(QUIET, 2, 0)]))
    finished = ledger.copy()
    finished.start_pass()
    assert not finished.is_prefix_of(ledger.extended([(QUIET, 2, 0)]))
    assert finished.is_prefix_of(finished.extended([(LOUD, 5), (LOUD, 5), (A, 1)]))
    assert not finished.extended([(LOUD, 5)]).is_prefix_of(finished)


def test_prefix_with_allocation_passes():
    ledger = Ledger()
    ledger.record(TEN, 13)
    assert ledger.is_prefix_of(ledger.extended([(TEN, 7, 0), (TEN, 25)]))
    assert ledger.is_prefix_of(ledger.extended([(LOW_TEN, 2, 0)]))
    empty = Ledger()
    for other in (LOUD, PrivacyEvent.allocation(noise_multiplier=2.0, num_batches=11)):
        assert not empty.extended([(TEN, 3)]).is_prefix_of(empty.extended([(other, 3)]))
    assert not ledger.extended([(TEN, 1, 0)]).is_prefix_of(ledger)


def test_unknown_relation_is_refused():
    with pytest.raises(ValueError, match="neighboring_relation='add'"):
        Ledger("add")


def test_ledgers_of_another_unit_are_another_history():
    ledger = Ledger(unit="user")
    ledger.record(A)
    state = ledger.state_dict()
    assert state["unit"] == "user"
    assert Ledger.from_state_dict(state).unit == ledger.copy().unit == ledger.extended([(A, 1)]).unit == "user"
    of_records = Ledger.from_state_dict({key: value for key, value in state.items() if key != "unit"})
    assert of_records.unit == "record"
    assert "unit" not in of_records.state_dict()
    assert ledger.is_prefix_of(Ledger.from_state_dict(state))
    assert not ledger.is_prefix_of(of_records)
    with pytest.raises(ValueError, match="Expected unit in"):
        Ledger(unit="household")
    with pytest.raises(PrivacyError, match="Expected unit in"):
        Ledger.from_state_dict({**state, "unit": "household"})


def test_a_run_with_correlated_noise_costs_one_gaussian():
    event = PrivacyEvent.correlated(noise_multiplier=2.0, num_steps=10)
    ledger = Ledger()
    for _ in range(7):
        ledger.record(event)
    assert ledger.mechanisms() == {(1.0, 2.0, 1): 1}
    again = Ledger.from_state_dict(ledger.state_dict())
    again.record(event, 3)  # a resumed run goes on with the open one
    assert again.mechanisms() == {(1.0, 2.0, 1): 1}
    again.record(event)  # one step more is another run
    assert again.mechanisms() == {(1.0, 2.0, 1): 2}
    assert ledger.extended([(event, 3, 0)]).mechanisms() == {(1.0, 2.0, 1): 1}
    assert ledger.extended([(event, 3, 1)]).mechanisms() == {(1.0, 2.0, 1): 2}
