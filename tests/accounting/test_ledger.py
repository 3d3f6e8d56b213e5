import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import Ledger, LedgerEntry, Mechanism, PrivacyEvent, make_accountant
from lightning_dp.errors import PrivacyError

A = PrivacyEvent.poisson(noise_multiplier=1.1, sample_rate=0.01)
B = PrivacyEvent.poisson(noise_multiplier=1.0, sample_rate=0.01)
LOUD = PrivacyEvent.shuffle(noise_multiplier=2.0)
QUIET = PrivacyEvent.shuffle(noise_multiplier=1.0)
TEN = PrivacyEvent.allocation(noise_multiplier=2.0, num_batches=10)
LOW_TEN = PrivacyEvent.allocation(noise_multiplier=1.0, num_batches=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
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


EVENTS = st.one_of(
    st.builds(
        lambda s, q: PrivacyEvent("poisson", s, q), st.sampled_from([0.0, 0.7, 1.0]), st.sampled_from([0.0, 0.1])
    ),
    st.builds(lambda s: PrivacyEvent("gaussian", s), st.sampled_from([0.5, 2.0])),
    st.builds(lambda s: PrivacyEvent("shuffle", s), st.sampled_from([1.0, 2.0])),
    st.builds(
        lambda s, t: PrivacyEvent("allocation", s, num_batches=t), st.sampled_from([1.0, 2.0]), st.sampled_from([1, 3])
    ),
    st.just(PrivacyEvent.non_private("no clipping")),
)
OPERATIONS = st.lists(st.one_of(st.tuples(EVENTS, st.integers(1, 5)), st.just("pass"), EVENTS), max_size=12)


def build(operations):
    ledger = Ledger()
    for operation in operations:
        if operation == "pass":
            ledger.start_pass()
        elif isinstance(operation, tuple):
            ledger.record(*operation)
        elif ledger.num_steps:
            ledger.amend_last(operation)
    return ledger


@given(OPERATIONS, EVENTS)
@settings(deadline=None, max_examples=200)
def test_state_survives_json_and_goes_on_as_before(operations, event):
    ledger = build(operations)
    restored = Ledger.from_state_dict(json.loads(json.dumps(ledger.state_dict(), allow_nan=False)))
    assert restored.state_dict() == ledger.state_dict()
    assert ledger.is_prefix_of(restored)
    assert restored.is_prefix_of(ledger)
    for one in (ledger, restored):
        one.record(event, 2)
    assert restored.state_dict() == ledger.state_dict()


@given(OPERATIONS)
@settings(deadline=None, max_examples=200)
def test_epsilon_never_falls_when_steps_are_added(operations):
    """With unsampled events, where epsilon is exact, and passes as one Gaussian each."""
    ledger, accountant, spent = Ledger(), make_accountant("gdp"), 0.0
    for operation in operations:
        if isinstance(operation, tuple) and operation[0].kind in ("gaussian", "shuffle", "allocation"):
            ledger.record(*operation)
        elif operation == "pass":
            ledger.start_pass()
        epsilon = accountant.epsilon(ledger, 1e-5)
        assert epsilon >= spent
        spent = epsilon


def state():
    ledger = Ledger("replace_one")
    ledger.record(A, 3)
    ledger.record(LOUD, 4)
    return json.loads(json.dumps(ledger.state_dict()))


WRONG: list[Any] = [None, -1, 1.5, math.nan, "x", [], {}, True]
WRONG_BY_FIELD = {
    ("version",): [*WRONG, 0, 2],
    ("neighboring_relation",): WRONG,
    ("lineage",): [*WRONG, "0" * 31, "g" * 32],
    ("pass_open",): [None, -1, 2, 0.5, "x", True],
    ("num_steps",): [*WRONG, 6, 8],
    ("entries",): [None, -1, "x", {}, True, [None], [{}]],
    ("entries", 0, "kind"): [*WRONG, "gaussian", "shuffle", "non_private"],
    ("entries", 0, "noise_multiplier"): [None, -1, math.nan, math.inf, "x", [], True],
    ("entries", 0, "sample_rate"): [None, -1, 1.5, math.nan, "x", [], True],
    ("entries", 0, "reason"): [None, 1, "x", []],
    ("entries", 0, "num_steps"): [*WRONG, 0, 2],
    ("entries", 0, "num_passes"): [*WRONG, 1],
    ("entries", 1, "num_steps"): [*WRONG, 0],
    ("entries", 1, "num_passes"): [*WRONG, 0, 2, 5],
}


def parent(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in WRONG_BY_FIELD.items() for value in values], ids=repr
)
def test_state_edited_by_hand_is_refused(path, value):
    edited = state()
    parent(edited, path)[path[-1]] = value
    with pytest.raises(PrivacyError, match="Expected an intact ledger"):
        Ledger.from_state_dict(edited)


@pytest.mark.parametrize("path", [*WRONG_BY_FIELD, ("entries", 0, "extra"), ("extra",)], ids=repr)
def test_state_with_missing_or_unknown_keys_is_refused(path):
    edited = state()
    keys = parent(edited, path)
    if path[-1] == "extra":
        keys["extra"] = 0
    else:
        del keys[path[-1]]
    with pytest.raises(PrivacyError, match=r"Expected an intact ledger.* keys"):
        Ledger.from_state_dict(edited)


def allocation_state():
    ledger = Ledger()
    ledger.record(TEN, 25)
    return json.loads(json.dumps(ledger.state_dict()))


def test_entries_of_older_kinds_look_as_before():
    """A checkpoint of an older version is read, and its shuffled passes stay without amplification."""
    keys = {"kind", "noise_multiplier", "sample_rate", "reason", "num_steps", "num_passes"}
    assert all(set(entry) == keys for entry in state()["entries"])
    assert {key.num_batches for key in Ledger.from_state_dict(state()).mechanisms()} == {1}
    assert set(allocation_state()["entries"][0]) == keys | {"num_batches"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_batches", value) for value in (None, 0, -1, 2.5, "x", True, 9)),  # 20 steps in 2 passes need 10 batches
        ("num_passes", 1),
        ("num_passes", 0),
        ("kind", "shuffle"),
        ("kind", "gaussian"),
    ],
)
def test_allocation_state_edited_by_hand_is_refused(key, value):
    edited = allocation_state()
    edited["entries"][0][key] = value
    with pytest.raises(PrivacyError, match="Expected an intact ledger"):
        Ledger.from_state_dict(edited)


def test_allocation_state_that_does_not_fit_is_refused():
    edited = allocation_state()
    edited["neighboring_relation"] = "replace_one"
    with pytest.raises(PrivacyError, match='kind="allocation", got neighboring_relation="replace_one"'):
        Ledger.from_state_dict(edited)
    edited = allocation_state()
    del edited["entries"][0]["num_batches"]
    with pytest.raises(PrivacyError, match=r"Expected keys .*num_batches"):
        Ledger.from_state_dict(edited)


@pytest.mark.parametrize("value", [None, [], "state", 3])
def test_state_that_is_no_dictionary_is_refused(value):
    with pytest.raises(PrivacyError, match="dictionary"):
        Ledger.from_state_dict(value)


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
