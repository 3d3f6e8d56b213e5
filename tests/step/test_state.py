"""PrivacyState: what is written when, what is refused, and what goes on elsewhere."""

from __future__ import annotations

import math
import pickle

import pytest

from lightning_dp.accounting import Ledger, PrivacyEvent
from lightning_dp.clipping import FlatClipping
from lightning_dp.errors import PrivacyError
from tests.step.rig import SIGMA, STEPS, make_plan, make_state


def test_release_makes_one_entry_per_step() -> None:
    state = make_state()
    for number in range(STEPS):
        state.begin_step()
        assert (state.step, state.steps_taken) == (number, number)
        state.record(SIGMA)
        assert state.steps_taken == number + 1
    (entry,) = state.ledger.entries
    assert (entry.num_steps, entry.event) == (STEPS, state.plan.event(0))


def test_releases_on_one_batch_add_up_their_precision() -> None:
    """Two releases at sigma are one at sigma / sqrt(2); at the planned total the plan's own number is written."""
    state = make_state()
    state.begin_step()
    state.record(SIGMA)
    state.record(SIGMA)
    (entry,) = state.ledger.entries
    assert entry.num_steps == 1
    assert entry.event.noise_multiplier == pytest.approx(SIGMA / math.sqrt(2))
    state = make_state()
    state.begin_step()
    for _ in range(2):
        state.record(SIGMA * math.sqrt(2))
    assert state.ledger.entries[0].event.noise_multiplier == state.plan.sigma(0)


def test_steps_of_checks_in_two_fits_are_stated_once() -> None:
    state = make_state()
    state.checked_steps += [0, 1, 9, 0, 1]
    assert state.kept_apart == ["checked on a few records before steps 1, 2, 10"]


def test_release_without_noise_is_written_as_unprotected() -> None:
    state = make_state(make_plan(FlatClipping(1.0), noise_multiplier=0.0))
    state.begin_step()
    state.record(0.0)
    assert state.epsilon() == math.inf


@pytest.mark.parametrize("promise", ["target", "budget"])
def test_further_release_is_refused_where_epsilon_was_promised(promise: str) -> None:
    state = make_state(make_plan(FlatClipping(1.0), target_epsilon=1.0 if promise == "target" else None))
    if promise == "budget":
        state.last_allowed_step = 5
    state.begin_step()
    state.record(SIGMA)
    with pytest.raises(PrivacyError, match="got a further step on the same batch"):
        state.record(SIGMA)
    assert state.ledger.entries[0].event.noise_multiplier == SIGMA


def test_steps_beyond_plan_or_budget_are_refused() -> None:
    state = make_state(make_plan(FlatClipping(1.0), target_epsilon=1.0))
    state.step = STEPS
    with pytest.raises(PrivacyError, match=f"at most the {STEPS} planned steps under target_epsilon=1"):
        state.check_budget()
    state = make_state()
    state.last_allowed_step = 1
    state.check_budget()
    state.begin_step()
    state.record(SIGMA)
    state.check_budget()  # a second release of the step that is allowed
    state.begin_step()
    with pytest.raises(PrivacyError, match="Expected to stop after 1 steps"):
        state.check_budget()


def test_epsilon_needs_a_step() -> None:
    with pytest.raises(ValueError, match="got no steps recorded"):
        make_state().epsilon()


def test_history_counts_and_is_compared_on_load() -> None:
    earlier = Ledger()
    earlier.record(PrivacyEvent(kind="gaussian", noise_multiplier=3.0), 5)
    state = make_state()
    state.begin_after([earlier])
    assert state.ledger.num_steps == 5
    state.begin_step()
    state.record(SIGMA)
    checkpoint = {"lightning_dp": state.state_dict(global_step=1), "global_step": 1}
    again = make_state()
    again.begin_after([earlier])
    again.load(checkpoint, allow_public=False, one_step_a_batch=True)
    assert (again.ledger.num_steps, again.step) == (6, 1)
    other = make_state()
    other.begin_after([Ledger.from_state_dict(earlier.state_dict()), earlier])  # ten steps: another beginning
    with pytest.raises(PrivacyError, match="began with the same history"):
        other.load(checkpoint, allow_public=False, one_step_a_batch=True)


def test_take_over_goes_on_where_another_process_ended() -> None:
    state = make_state(seeded=True)
    state.begin_step()
    state.record(SIGMA)
    state.nonprivate_logs.add("loss")
    state.choices.add("best.ckpt")
    main = make_state()
    main.take_over(pickle.loads(pickle.dumps(state.handover())))
    assert main.ledger.state_dict() == state.ledger.state_dict()
    assert (main.steps_taken, main.unledgered) == (1, 0)
    assert main.notes.seeded
    assert main.nonprivate_logs == {"loss"}
    assert main.choices == {"best.ckpt"}


def test_secure_noise_is_stated_only_if_every_run_had_it() -> None:
    secure, plain = make_state(secure=True), make_state(secure=False)
    assert secure.notes.secure_rng
    secure.take_notes(plain.notes)
    assert not secure.notes.secure_rng


def test_steps_from_before_the_run_are_noted_once() -> None:
    state = make_state()
    state.note_unledgered(3, [[{"step": 7}], [{"exp_avg": 0}]])
    assert state.unledgered == 7
    state.note_unledgered(2, [])
    assert state.unledgered == 7
