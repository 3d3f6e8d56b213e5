"""Private loops: attacks and mistakes."""

from __future__ import annotations

import copy
import gc
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_dp import PrivacyError
from tests.helpers import NUM_CLASSES, make_dataset
from tests.loops import BATCH, CLOSE, clipped_mean, double_loader, make_model, mean_loss, start, train


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
        with pytest.raises(TypeError, match="got an attempt to copy it"):
            copy.copy(batch)
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
    with start(epochs=1) as private:
        batch = next(iter(private.loader))
        with pytest.raises(TypeError, match=r"attempt to unpack it\. Pass it to step or backward"):
            _, _ = batch
        with pytest.raises(TypeError, match=r"attempt to take \[0\] of it\. Pass it to step or backward"):
            batch[0]
        with pytest.raises(AttributeError, match=r"attempt to take \.to of it\. Pass it to step or backward"):
            batch.to("cpu")


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
