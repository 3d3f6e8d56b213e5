"""Private loops: saving and resuming."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp import Ledger, PrivacyError
from lightning_dp.accounting import make_accountant
from tests.loops import make_model, start, train


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.one_in(2)
def test_resumed_run_spends_what_one_run_does(kind: Any, tmp_path: Path) -> None:
    model = make_model()
    optimizer = kind(model.parameters(), lr=0.01)
    options: dict[str, Any] = {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 2}
    with start(model, optimizer=optimizer, **options) as private:
        train(private, 3)
        sigma = private.plan.noise_multiplier
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lightning_dp": private.state_dict()}
        torch.save(state, tmp_path / "last.pt")
    loaded = torch.load(tmp_path / "last.pt", weights_only=True)
    model = make_model()
    optimizer = kind(model.parameters(), lr=0.01)
    with start(copy.deepcopy(model), history=[], **options) as private:  # loads and saves again, without a step
        private.load_state_dict(loaded["lightning_dp"])
        again = private.state_dict()
        assert again["plan"] == loaded["lightning_dp"]["plan"]
    with start(model, optimizer=optimizer, **options) as private:
        private.load_state_dict(loaded["lightning_dp"])
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        while private.steps_left:
            train(private, 8)
        assert private.plan.noise_multiplier == sigma
        assert private.steps_taken == 8
        resumed = private.epsilon()
    whole = Ledger()
    for _ in range(8):
        whole.record(private.plan.event(0))
    assert resumed == pytest.approx(make_accountant("pld").epsilon(whole, 1e-3), rel=1e-9)
    with start(make_model(), history=tmp_path / "last.pt", noise_multiplier=1.0) as private:
        assert private.ledger.num_steps == 3


def test_weights_of_another_moment_are_refused() -> None:
    model = make_model()
    with start(model, noise_multiplier=1.0) as private:
        train(private, 1)
        early = private.state_dict()
        train(private, 3)
        late = copy.deepcopy(model.state_dict())
    model = make_model()
    with start(model, noise_multiplier=1.0) as private:
        private.load_state_dict(early)
        model.load_state_dict(late)
        with pytest.raises(
            PrivacyError, match="The weights are not those that the loaded privacy state was saved with"
        ):
            private.step(next(iter(private.loader)))


def test_optimizer_without_its_ledger_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    with start(model, optimizer=optimizer, noise_multiplier=1.0) as private:
        train(private, 2)
    state = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), state)
    state.seek(0)
    weights, steps = torch.load(state, weights_only=True)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    model.load_state_dict({name: 0.5 * value for name, value in weights.items()})  # no copy that is known by its values
    optimizer.load_state_dict(steps)
    with (
        start(model, optimizer=optimizer, noise_multiplier=1.0) as private,
        pytest.raises(PrivacyError, match="The optimizer has taken 2 steps and the ledger knows of 0"),
    ):
        private.step(next(iter(private.loader)))
    with start(model, optimizer=optimizer, noise_multiplier=1.0, allow_public_checkpoint=True) as private:
        train(private, 1)
        assert private.state_dict()["unledgered"] == 2


def test_damaged_or_late_states_are_refused() -> None:
    with start(noise_multiplier=1.0) as private:
        train(private, 1)
        state = private.state_dict()
        with pytest.raises(RuntimeError, match="This run has taken steps"):
            private.load_state_dict(state)
    with start(noise_multiplier=1.0) as private:
        for damaged in ({}, {**state, "ledger": None}, {key: state[key] for key in state if key != "step"}, "state"):
            with pytest.raises(PrivacyError, match="Expected"):
                private.load_state_dict(damaged)  # type: ignore[arg-type]


def test_a_run_counts_earlier_runs_on_its_weights() -> None:
    model = make_model()
    with start(model, noise_multiplier=1.0) as first:
        train(first, 2)
    with start(model, noise_multiplier=1.0) as second:
        with pytest.warns(UserWarning, match="its 2 steps count towards epsilon here, too"):
            train(second, 1)
        assert second.ledger.num_steps == 3
    with start(model, noise_multiplier=1.0, history=first) as third:
        train(third, 1)
        assert third.ledger.num_steps == 3


def test_a_run_that_ends_after_the_plan_of_another_is_refused() -> None:
    model = make_model()
    copied = copy.deepcopy(model)
    with start(model, target_epsilon=3.0, target_delta=1e-3, steps=5) as planned:
        assert planned.plan.sigma(0) > 0
        with start(copied, noise_multiplier=1.0) as other:
            train(other, 2)
        model.load_state_dict(copied.state_dict())
        with pytest.raises(PrivacyError, match="trained by an earlier private run of 2 steps, which this run does not"):
            planned.step(next(iter(planned.loader)))


@pytest.mark.filterwarnings("ignore:.*trained by an earlier private run:UserWarning")
def test_layers_that_begin_to_train_later_carry_their_run() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    with start(model, noise_multiplier=1.0) as first:
        train(first, 1)
        model[0].requires_grad_(True)
        train(first, 3)
    model[2] = torch.nn.Linear(5, 3).double()
    with start(model, noise_multiplier=1.0) as second:
        train(second, 1)
        assert second.ledger.num_steps == 4


def test_weights_of_an_open_run_are_known() -> None:
    model = make_model()
    with start(model, noise_multiplier=1.0) as first:
        train(first, 1)
        before = copy.deepcopy(model.state_dict())
        train(first, 2)
        model.load_state_dict(before)  # its own
        with start(copy.deepcopy(model), noise_multiplier=1.0) as second:
            with pytest.warns(UserWarning, match="its 2 steps count towards epsilon here, too"):
                train(second, 1)
            train(first, 3)
            second._model.load_state_dict(model.state_dict())
            with pytest.raises(PrivacyError, match="trained by an earlier private run of 3 steps, which this run does"):
                train(second, 2)


def test_each_resume_of_one_state_counts_its_own_steps() -> None:
    model = make_model()
    with start(model, noise_multiplier=1.0) as private:
        train(private, 2)
        saved, weights = private.state_dict(), copy.deepcopy(model.state_dict())
    for _ in range(2):
        model.load_state_dict(weights)
        with start(model, noise_multiplier=1.0) as private:
            private.load_state_dict(saved)
            train(private, 3)
            assert private.ledger.num_steps == 3
