"""Private training in a plain loop: gradient, noise, ledger, resume, and what is refused."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_dp import DPStrategy, Ledger, PrivacyError, schedules
from lightning_dp.accounting import make_accountant
from lightning_dp.loop import PrivateLoop, make_private
from lightning_dp.step.limit import EpsilonLimit
from lightning_dp.step.settings import Settings
from tests.helpers import NUM_CLASSES, NUM_FEATURES, make_dataset
from tests.reference import per_sample_gradients

SIZE, BATCH = 32, 8
CLOSE = {"rtol": 3e-6, "atol": 3e-7}  # the clipping keeps a margin of 1e-6 for rounding


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES)).double()


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def losses(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def double_loader(size: int = SIZE, batch_size: int = BATCH) -> DataLoader:
    return DataLoader(make_dataset(size, dtype=torch.float64), batch_size=batch_size, shuffle=True)


def start(
    model: nn.Module | None = None, loss_fn: Any = mean_loss, optimizer: Any = None, **options: Any
) -> PrivateLoop:
    """A run over the small classifier, without noise unless asked for."""
    model = make_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5) if optimizer is None else optimizer
    if "target_epsilon" not in options:
        options = {"noise_multiplier": 0.0, **options}
    return make_private(model, optimizer, options.pop("loader", double_loader()), loss_fn, **options)


def drawn_samples(batch: Any) -> tuple[Tensor, Tensor]:
    parts = [part for _, part in batch.microbatches]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def clipped_mean(model: nn.Module, batch: Any, bound: float, divisor: int = BATCH) -> dict[str, Tensor]:
    """The private gradient without noise, one sample at a time."""
    features, labels = drawn_samples(batch)
    grads = per_sample_gradients(
        model, lambda i: mean_loss(model, (features[i : i + 1], labels[i : i + 1])), len(features)
    )
    norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()
    factors = (bound / norms).clamp(max=1.0)
    return {name: torch.einsum("b,b...->...", factors, grad) / divisor for name, grad in grads.items()}


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


# ---------------------------------------------------------------- saving and resuming


def train(private: PrivateLoop, steps: int) -> None:
    for batch in private.loader:
        private.step(batch)
        if private.steps_taken == steps:
            return


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


# ---------------------------------------------------------------- attacks and mistakes


def test_a_second_loss_function_is_tried_before_its_first_step() -> None:
    with start(noise_multiplier=1.0, target_delta=1e-3, steps=20) as private:
        batches = (batch for _ in range(5) for batch in private.loader)
        for _ in range(4):  # the later checks come before steps 2 and 10
            private.backward(next(batches), lambda model, batch: mean_loss(model, batch))
        before = private.ledger.num_steps
        batch = next(batches)
        with pytest.raises(PrivacyError, match=r"influence each other|when run alone"):
            private.backward(batch, lambda model, batch: mean_loss(model, [batch[0] - batch[0].mean(0), batch[1]]))
        assert private.ledger.num_steps == before


def test_raw_step_is_refused() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    other = torch.optim.SGD(model.parameters(), lr=1.0)
    with start(model, optimizer=optimizer) as private:
        with pytest.raises(PrivacyError, match="wrote a raw gradient into a private parameter"):
            mean_loss(model, make_dataset(4, dtype=torch.float64).tensors).backward()
        for each in (optimizer, other):
            with pytest.raises(PrivacyError, match=r"by itself, without a private gradient\. Let the private run"):
                each.step()
        private.backward(next(iter(private.loader)))
        with pytest.raises(PrivacyError, match="wrote a raw gradient"):
            mean_loss(model, make_dataset(4, dtype=torch.float64).tensors).backward()
        loss = mean_loss(model, make_dataset(4, dtype=torch.float64).tensors)
        model[0].weight.grad = torch.autograd.grad(loss, model[0].weight)[0]
        for each in (optimizer, other):
            with pytest.raises(PrivacyError, match="put in place of the private one"):
                each.step()
            model[0].weight.grad = torch.ones_like(model[0].weight)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_released_gradient_may_be_clipped_in_place() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with start(model, optimizer=optimizer, noise_multiplier=1.0) as private:
        for batch in private.loader:
            private.backward(batch)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
            assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_parameter_that_is_unfrozen_later_is_watched() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    with start(model) as private:
        train(private, 1)
        model[0].weight.requires_grad_(True)
        with pytest.raises(PrivacyError, match="wrote a raw gradient"):
            mean_loss(model, make_dataset(4, dtype=torch.float64).tensors).backward()
        assert model[0].weight.grad is None
        expected = None
        for batch in private.loader:
            if batch:
                expected = clipped_mean(model, batch, 1.0)
                private.step(batch)
                torch.testing.assert_close(model[0].weight.grad, expected["0.weight"], **CLOSE)
        assert expected is not None


def stepping(model: nn.Module, batch: Any) -> Tensor:
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return mean_loss(model, batch)


def coupled(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(batch[0])
    return nn.functional.cross_entropy(outputs - outputs.mean(0), batch[1])


class Queue:
    """A loss that remembers records in a list of its own."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        known = torch.stack(self.seen[-8:]).mean(0) if self.seen else torch.zeros(NUM_CLASSES, dtype=torch.float64)
        self.seen += list(outputs.detach())
        return nn.functional.cross_entropy(outputs + known, batch[1])


RARE = 7.25
"""A value that one record alone has."""


class Flag:
    """A loss that stays 0 once a rare record has come."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if (batch[0] == RARE).any():
            self.seen = True
        return mean_loss(model, batch) * (not hasattr(self, "seen"))


class Scale:
    """A loss whose factor a rare record changes."""

    factor = torch.ones(())

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if (batch[0] == RARE).any():
            self.factor = torch.tensor(0.5)
        return mean_loss(model, batch) * self.factor


@pytest.mark.parametrize("loss_fn", [Flag(), Scale().loss])
def test_a_rare_record_that_a_loss_object_keeps_is_refused(loss_fn: Any) -> None:
    features, labels = make_dataset(64, dtype=torch.float64).tensors
    features[30] = RARE
    loader = DataLoader(TensorDataset(features, labels), batch_size=BATCH)
    with start(loss_fn=loss_fn, loader=loader, noise_multiplier=1.0, seed=1) as private:
        batches = itertools.chain.from_iterable(private.loader for _ in range(8))
        with pytest.raises(PrivacyError, match="it differs after the records of a batch"):
            deque(map(private.step, batches), maxlen=0)


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (stepping, "SGD stepped by itself while your step ran on trial"),
        (coupled, "gradient"),
        (Queue(), "changes with what training_step saw before"),
    ],
)
def test_loss_functions_that_leak_are_refused(loss_fn: Any, match: str) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with start(model, loss_fn, noise_multiplier=1.0) as private:
        with pytest.raises(PrivacyError, match=match):
            private.step(next(iter(private.loader)))
        assert private.ledger.num_steps == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("loss_fn", "error", "match"),
    [
        (lambda model, batch: None, TypeError, "Expected loss_fn to return a loss tensor, got None"),
        (lambda model, batch: 1.0, TypeError, "Expected loss_fn to return a loss tensor, a dictionary with 'loss'"),
        (lambda model, batch: model(batch[0]), ValueError, r"Expected a loss of shape \(\) or \(B,\)"),
        (lambda model, batch: batch[0].mean(), ValueError, "got one that depends on no trainable parameter"),
        (lambda model, batch: model(batch[0]).half().mean(), ValueError, "float32's range, got float16"),
    ],
)
def test_outputs_that_are_no_loss_are_refused(loss_fn: Any, error: type[Exception], match: str) -> None:
    with start(loss_fn=loss_fn) as private, pytest.raises(error, match=match):
        private.step(next(iter(private.loader)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": "net", "optimizer": "sgd"}, "Expected model to be of type Module, got str. Pass the network"),
        ({"optimizer": "sgd"}, "Expected optimizer to be of type Optimizer, got str. Pass an optimizer"),
        ({"loss_fn": "mse"}, "Expected loss_fn to be of type Callable, got str. Pass a function of model and batch"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        start(**options)


def test_batches_are_used_once_and_from_the_own_loader() -> None:
    with start() as private, start() as other:
        batch = next(iter(private.loader))
        private.step(batch)
        with pytest.raises(PrivacyError, match="This batch was used for a step already"):
            private.step(batch)
        for foreign in (next(iter(other.loader)), next(iter(private._drawn))):
            with pytest.raises(PrivacyError, match="got one of another loader"):
                private.step(foreign)
        with pytest.raises(TypeError, match="Expected a batch of the private loader, got list"):
            private.step(next(iter(double_loader())))


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none"), nn.functional.cross_entropy]
)
@pytest.mark.one_in(3)
def test_criterion_takes_outputs_and_targets(criterion: Any) -> None:
    model = make_model()
    with start(model, criterion, max_grad_norm=0.5, epochs=1) as private:
        batch = next(batch for batch in private.loader if batch)
        expected = clipped_mean(model, batch, 0.5)
        private.backward(batch)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])


def test_batches_for_a_criterion_must_be_pairs() -> None:
    data = TensorDataset(torch.randn(16, 2))
    message = r"Expected batches \(inputs, targets\) for the loss MSELoss, got list of 1"
    run = start(nn.Linear(2, 1), nn.MSELoss(), loader=DataLoader(data, batch_size=4), epochs=1)
    with run, pytest.raises(TypeError, match=message):
        run.step(next(iter(run.loader)))


def test_drawn_batch_cannot_be_unpacked() -> None:
    with start(epochs=1) as private, pytest.raises(TypeError, match="Pass it to step or backward"):
        _, _ = next(iter(private.loader))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from make_dataset(16, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"target_epsilon": 1.0}, ValueError, "Expected epochs or steps with target_epsilon=1, got neither"),
        ({"epochs": 1, "steps": 2}, ValueError, "Expected at most one of epochs and steps, got epochs=1 and steps=2"),
        ({"epochs": 0}, ValueError, "Expected epochs >= 1, got epochs=0"),
        ({"steps": 2.0}, TypeError, "Expected steps to be a whole number, got steps=2.0"),
        ({"epoch": 1}, TypeError, "Expected arguments of make_private, got epoch=1. Did you mean epochs"),
        ({"strict_logging": True}, TypeError, "Expected arguments of make_private, got strict_logging=True"),
        ({"max_grad_norm": 0.0}, ValueError, "Expected 0 < max_grad_norm < inf"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))])},
            ValueError,
            "to be one of the module's, got one of shape",
        ),
        (
            {"model": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))},
            PrivacyError,
            "layers that treat each sample alone",
        ),
        (
            {"loader": DataLoader(Stream(), batch_size=4), "epochs": 1, "sampling": "shuffle"},
            ValueError,
            "Expected steps for a stream without a length, got epochs=1",
        ),
    ],
)
def test_wrong_arguments_are_refused_at_once(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        start(**options)


def test_model_of_an_open_run_is_refused() -> None:
    model = make_model()
    with start(model), pytest.raises(RuntimeError, match="The model belongs to another private run that is open"):
        start(model)
    private = start(model)
    train(private, 1)
    del private
    gc.collect()
    start(model, history=[]).close()  # a run that nobody holds has undone itself


def test_close_leaves_the_model_plain() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = start(model, optimizer=optimizer, noise_multiplier=1.0)
    train(private, 1)
    private.close()
    private.close()
    assert private.epsilon() > 0
    with pytest.raises(RuntimeError, match="The private run is closed"):
        private.step(next(iter(private.loader)))
    mean_loss(model, make_dataset(4, dtype=torch.float64).tensors).backward()
    optimizer.step()
