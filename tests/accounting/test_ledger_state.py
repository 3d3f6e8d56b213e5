"""The state of a ledger: it survives JSON, and one edited by hand is refused."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from lightning_dp.errors import PrivacyError
from tests.accounting.test_ledger import LOUD, TEN, A
from tests.cases import each

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
    ledger = ledger.resumed()
    ledger.record(LOUD, 4)
    return json.loads(json.dumps(ledger.state_dict()))


WRONG: list[Any] = [None, -1, 1.5, math.nan, "x", [], {}, True]
WRONG_BY_FIELD = {
    ("version",): [*WRONG, 0, 2],
    ("neighboring_relation",): WRONG,
    ("lineage",): [*WRONG, "0" * 31, "g" * 32],
    ("resumed",): [None, -1, "x", {}, [[]], ["ab"]],
    ("resumed", 0, 0): [*WRONG, "0" * 31],
    ("resumed", 0, 1): [None, -1, 1.5, "x", True, 8],
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


@each("path, value", [(path, value) for path, values in WRONG_BY_FIELD.items() for value in values])
def test_state_edited_by_hand_is_refused(path, value):
    edited = state()
    parent(edited, path)[path[-1]] = value
    with pytest.raises(PrivacyError, match="Expected an intact ledger"):
        Ledger.from_state_dict(edited)


KEYS = [path for path in WRONG_BY_FIELD if path[0] != "resumed"]


@each("path", [*KEYS, ("entries", 0, "extra"), ("extra",)])
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
