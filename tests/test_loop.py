"""Private training in a plain loop: gradient, noise, ledger, resume, and what is refused."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError, schedules
from lightning_dp.step.limit import EpsilonLimit
from lightning_dp.step.settings import Settings
from tests.helpers import make_dataset
from tests.loops import (
    BATCH,
    CLOSE,
    SIZE,
    clipped_mean,
    double_loader,
    drawn_samples,
    losses,
    make_model,
    mean_loss,
    start,
)

# ---------------------------------------------------------------- the private gradient


@pytest.mark.parametrize("microbatch_size", [None, 3, 1])
@pytest.mark.parametrize("loss_fn", [mean_loss, losses])
@pytest.mark.one_in(3)
def test_gradient_equals_a_loop_over_samples(microbatch_size: int | None, loss_fn: Any) -> None:
    model = make_model()
    with start(model, loss_fn, microbatch_size=microbatch_size, max_grad_norm=0.5, epochs=2) as private:
        for batch in private.loader:
            if batch:
                expected = clipped_mean(model, batch, 0.5)
                before = {name: p.detach().clone() for name, p in model.named_parameters()}
                private.step(batch)
                for name, parameter in model.named_parameters():
                    torch.testing.assert_close(parameter.grad, expected[name], **CLOSE)
                    torch.testing.assert_close(parameter, before[name] - 0.5 * expected[name], **CLOSE)


def test_gradient_under_autocast_is_close() -> None:
    """bfloat16 inside the loss function widens the tolerance of the trial, and nothing else."""
    model = make_model().float()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mean_loss(model, batch)

    loader = DataLoader(make_dataset(SIZE), batch_size=BATCH)
    with start(model, loss_fn, loader=loader) as private:
        batch = next(batch for batch in private.loader if batch)
        expected = clipped_mean(model, batch, 1.0)
        private.step(batch)
    for name, parameter in model.named_parameters():
        assert float((parameter.grad - expected[name]).norm()) < 0.05 * float(expected[name].norm())


def test_noise_has_the_planned_std() -> None:
    model, sigma, bound = nn.Linear(200, 100), 0.7, 0.3
    loader = DataLoader(TensorDataset(torch.randn(32, 200)), batch_size=BATCH)

    def no_signal(model: nn.Module, batch: Any) -> Tensor:
        return 0.0 * model(batch[0]).mean()

    with start(model, no_signal, loader=loader, noise_multiplier=sigma, max_grad_norm=bound) as private:
        private.step(next(iter(private.loader)))
    values = torch.cat([p.grad.flatten() for p in model.parameters()]) * BATCH
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], df=values.numel())

    def fits(std: float) -> bool:
        return bool(low < float((values / std).square().sum()) < high)

    assert fits(sigma * bound)
    assert not any(fits(wrong * sigma * bound) for wrong in (2 / 3, 3 / 2))


def test_empty_batches_step_and_count() -> None:
    """One record of weight 0 runs instead: noise, ledger entry and optimizer step as ever, and a gradient of exactly
    zero.
    """
    model, seen = make_model(), []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        return mean_loss(model, batch)

    with start(model, loss_fn, loader=double_loader(400, 1)) as private:
        empty = 0
        for batch in private.loader:
            del seen[:]
            private.step(batch)
            if not batch and private.steps_taken > 2:
                empty += 1
                assert seen[-1] == 1
                assert all(not p.grad.any() for p in model.parameters())
                assert math.isnan(private.nonprivate_loss)
            if empty == 3:
                break
        assert private.ledger.num_steps == private.steps_taken > empty
    assert empty == 3


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.one_in(2)
def test_state_does_not_depend_on_microbatches(microbatch_size: int | None) -> None:
    """Buffers, counters in the module and the user's generator move as if the loss function had run once."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = make_model(), 0
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, features: Tensor) -> Tensor:
            self.calls += 1
            self.steps += 1
            return self.net(features)

    model = Counting()
    state = torch.get_rng_state()
    with start(model, microbatch_size=microbatch_size) as private:
        for number, batch in enumerate(private.loader, 1):
            private.step(batch)
            assert (model.calls, int(model.steps)) == (number, number)
    assert number == 4
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    iter(DataLoader(range(4)))  # draws the seed of its workers, as the private loader does
    assert torch.equal(torch.get_rng_state(), after)


def test_state_in_a_closure_is_put_back() -> None:
    criterion = nn.Linear(1, 1)
    criterion.calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        criterion.calls += 1
        return mean_loss(model, batch)

    with start(loss_fn=loss_fn, microbatch_size=2) as private:
        private.step(next(batch for batch in private.loader if len(batch) > 1))
    assert criterion.calls == 1


# ---------------------------------------------------------------- accounting


@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 12}])
@pytest.mark.one_in(2)
def test_target_is_met_at_the_planned_end(length: dict[str, int]) -> None:
    with start(target_epsilon=3.0, target_delta=1e-3, **length) as private:
        assert private.steps_left == 12
        while private.steps_left:
            for batch in private.loader:
                private.step(batch)
        assert 2.9 < private.epsilon() <= 3.0
        assert private.ledger.num_steps == private.steps_taken == 12
        assert "Privacy: (epsilon=2.9" in private.privacy_statement()
        with pytest.raises(PrivacyError, match="Expected at most the 12 planned steps under target_epsilon=3"):
            private.step(next(iter(private.loader)))
    assert private.ledger.num_steps == 12


def test_pass_ends_at_the_last_planned_step() -> None:
    with start(steps=6, noise_multiplier=1.0) as private:
        counts = []
        while private.steps_left:
            counts.append(sum(1 for batch in private.loader if private.step(batch) is None))
    assert counts == [4, 2]


def test_shuffle_counts_passes() -> None:
    with start(sampling="shuffle", noise_multiplier=2.0, epochs=2) as private:
        for _ in range(2):
            for batch in private.loader:
                private.step(batch)
    assert [entry.num_passes for entry in private.ledger.entries] == [1, 1]
    assert private.ledger.num_steps == 8


def test_mechanisms_of_the_core_are_used() -> None:
    with start(noise_multiplier=2.0, steps=4, target_delta=1e-5) as private:
        private.mechanisms.add("mine", noise_schedule=lambda length: schedules.exponential(0.5))
        for batch in private.loader:
            private.step(batch)
    assert [entry.event.noise_multiplier for entry in private.ledger.entries] == [2.0, 1.0, 0.5, 0.25]
    assert private.notes.mechanisms == ("the schedule of the noise: str()",)


def test_budget_ends_the_loop() -> None:
    with start(noise_multiplier=1.0, target_delta=1e-3, epochs=50) as private:
        private.mechanisms.add("mine", limit=EpsilonLimit(4.0))
        while private.steps_left:
            for batch in private.loader:
                private.step(batch)
        assert 3.5 < private.epsilon() <= 4.0
        assert private.steps_taken < 200
        with pytest.raises(PrivacyError, match="where the privacy budget ends, got one more"):
            private.step(next(iter(private.loader)))


def test_loss_is_named_in_the_statement_once_read() -> None:
    with start(noise_multiplier=1.0, microbatch_size=3) as private:
        batch = next(batch for batch in private.loader if batch)
        model = copy.deepcopy(private._model)
        private.step(batch)
        assert "nonprivate_loss" not in private.privacy_statement()
        assert private.nonprivate_loss == pytest.approx(mean_loss(model, drawn_samples(batch)).item())
        assert "logged without noise: nonprivate_loss" in private.privacy_statement()


def test_arguments_are_those_of_the_strategy() -> None:
    signature = inspect.signature(
        DPStrategy.__init__.__wrapped__ if hasattr(DPStrategy.__init__, "__wrapped__") else DPStrategy
    )
    theirs = {name: each.default for name, each in signature.parameters.items() if each.kind is each.KEYWORD_ONLY}
    # a loop gets optimizer and module together, too late to exchange layers
    assert theirs == {**{each.name: each.default for each in fields(Settings)}, "history": None, "fix": False}
