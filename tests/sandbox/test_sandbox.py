"""The sandbox: user code in it has no effect, no optimizer steps, and nobody sees a raw gradient."""

from __future__ import annotations

import functools
import random
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_dp.errors import PrivacyError
from lightning_dp.sandbox.sandbox import USE_OPTIMIZERS, Sandbox, StepGuard
from tests.sandbox.photo import photo

CPU = torch.device("cpu")


def generators() -> str:
    """The states of the global generators of torch, numpy and Python."""
    return repr((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()))  # noqa: NPY002


class User(nn.Module):
    """A module with state of many kinds and an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.queue, self.seen, self.count = deque([0.0], maxlen=2), {"a": [1]}, 0
        self.teacher = [nn.Linear(3, 2)]
        self.generator, self.rng = torch.Generator().manual_seed(1), np.random.default_rng(2)
        self.own = torch.optim.Adam(self.network[0].parameters(), lr=0.1)

    def use_everything(self) -> None:
        """One step as a user may write it, but for its optimizers."""
        self.network(torch.rand(5, 3, generator=self.generator)).sum().backward()
        self.queue.append(float(self.rng.normal()))
        self.seen["b"] = self.seen.pop("a")
        self.count += 1
        self.teacher[0].weight.data.mul_(0.9)
        self.own.param_groups[0]["lr"] *= 0.5
        self.own.zero_grad()
        self.late = torch.randn(2) * random.random() * np.random.rand()  # noqa: NPY002
        self.eval()


class Bench:
    """A module, the optimizer and scheduler of its host, and a sandbox around them."""

    def __init__(self) -> None:
        self.module = User()
        self.optimizer = torch.optim.SGD(self.module.network[3].parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
        self.quiet: list[str] = []
        private = {id(p) for p in self.module.parameters()}
        self.guard = StepGuard(lambda o: any(id(p) in private for group in o.param_groups for p in group["params"]))
        self.sandbox = Sandbox(self.module, self.guard, lambda: [self.optimizer, self.scheduler], lambda: self._quiet())

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        self.quiet.append("on")
        yield
        self.quiet.append("off")

    def picture(self) -> Any:
        grads = [photo(p.grad) for p in self.module.parameters()]
        return photo([self.module, self.optimizer, self.scheduler])[2:], grads, generators()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    made.guard.start()
    yield made
    made.guard.stop()


def test_user_code_leaves_nothing_behind(bench: Bench) -> None:
    before = bench.picture()
    with bench.sandbox.enter():
        bench.module.use_everything()
        bench.scheduler.step()
        assert bench.picture() != before
    assert bench.picture() == before
    bench.module.use_everything()
    assert bench.picture() != before


def test_exception_in_user_code_leaves_nothing_behind(bench: Bench) -> None:
    before = bench.picture()

    def fail() -> None:
        bench.module.use_everything()
        raise KeyError("of the user's")

    with pytest.raises(KeyError, match="of the user's"), bench.sandbox.enter():
        fail()
    assert bench.picture() == before
    assert bench.guard.in_sandbox == 0


def test_records_made_nan_on_trial_are_no_anomaly(bench: Bench) -> None:
    with torch.autograd.set_detect_anomaly(True):
        with bench.sandbox.enter():
            assert not torch.is_anomaly_enabled()
        assert torch.is_anomaly_enabled()


def test_gradients_are_hidden_and_come_back(bench: Bench) -> None:
    parameters = list(bench.module.parameters())
    gradients = [torch.full_like(p, float(number)) for number, p in enumerate(parameters)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    with bench.sandbox.enter():
        assert [p.grad for p in parameters] == [None] * len(parameters)
        bench.module.network(torch.ones(2, 3)).sum().backward()
    assert all(p.grad is gradient for p, gradient in zip(parameters, gradients, strict=True))
    assert [float(gradient.mean()) for gradient in gradients] == list(range(len(parameters)))


def test_raw_gradients_are_gone_afterwards(bench: Bench) -> None:
    with bench.sandbox.enter():
        bench.module.network(torch.ones(2, 3)).sum().backward()
        assert any(p.grad is not None for p in bench.module.parameters())
    assert [p.grad for p in bench.module.parameters()] == [None] * len(list(bench.module.parameters()))


def test_global_generators_are_put_back(bench: Bench) -> None:
    before = generators()
    with bench.sandbox.enter():
        torch.manual_seed(9), np.random.seed(9), random.seed(9)  # noqa: NPY002
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    assert generators() == before


def test_host_is_quiet_inside_only(bench: Bench) -> None:
    assert bench.quiet == []
    with bench.sandbox.enter():
        assert bench.quiet == ["on"]
    assert bench.quiet == ["on", "off"]


def test_scheduler_before_its_optimizer_does_not_warn(bench: Bench) -> None:
    """No optimizer steps here, and torch would complain about the order."""
    with warnings.catch_warnings(), bench.sandbox.enter():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
        bench.scheduler.step()
    assert bench.scheduler.last_epoch == 0


OPTIMIZERS = {
    "host's": lambda bench: bench.optimizer,
    "kept by the module": lambda bench: bench.module.own,
    "made on the spot": lambda bench: torch.optim.Adam(bench.module.parameters()),
    "of public parameters": lambda bench: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0),
}


@pytest.mark.parametrize("whose", OPTIMIZERS)
def test_no_optimizer_steps_in_the_sandbox(bench: Bench, whose: str) -> None:
    before = bench.picture()
    optimizer = OPTIMIZERS[whose](bench)

    def train() -> None:
        bench.module.network(torch.ones(2, 3)).sum().backward()
        optimizer.step()

    message = r"stepped by itself while your step ran on trial.*self\.optimizers\(\)"
    with pytest.raises(PrivacyError, match=message), bench.sandbox.enter():
        train()
    assert bench.picture() == before


@pytest.mark.parametrize("whose", ["host's", "kept by the module", "made on the spot"])
def test_private_step_without_a_release_is_refused(bench: Bench, whose: str) -> None:
    optimizer = OPTIMIZERS[whose](bench)
    weights = [p.clone() for p in bench.module.parameters()]
    for parameter in bench.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(
        PrivacyError, match=rf"{type(optimizer).__name__} stepped private parameters by itself, without"
    ):
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(bench.module.parameters(), weights, strict=True))


def test_public_optimizer_may_step_by_itself(bench: Bench) -> None:
    OPTIMIZERS["of public parameters"](bench).step()


def test_expected_step_passes_and_others_do_not(bench: Bench) -> None:
    with bench.guard.stepping(bench.optimizer):
        bench.optimizer.step()
        with pytest.raises(PrivacyError, match=r"Adam stepped private parameters by itself"):
            bench.module.own.step()


def test_steps_pass_once_all_is_released(bench: Bench) -> None:
    """An optimizer made of several, which steps them after its own gradient is private."""
    with bench.guard.stepping(bench.optimizer):
        bench.guard.released()
        bench.module.own.step()
    with pytest.raises(PrivacyError, match="stepped private parameters by itself"):
        bench.module.own.step()


def test_an_optimizer_may_hand_its_closure_on(bench: Bench) -> None:
    """As ``Lookahead`` does: the inner optimizer runs the closure, which makes gradients private, and steps."""

    class Outer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return bench.module.own.step(closure)

    outer = Outer(bench.module.parameters(), lr=0.1)
    closure = functools.partial(lambda own: own(), lambda: 0.0)  # as Lightning wraps it
    with bench.guard.stepping(outer, closure.args[0]):
        bench.module.own.step(closure)  # of an outer one that torch has not set up, so that nothing sees its step
    with bench.guard.stepping(outer, closure):
        bench.module.own.step(lambda: 2 * closure())  # as one that changes the gradient, which is private by then
    with bench.guard.stepping(outer):
        outer.step(lambda: 0.0)
        with pytest.raises(PrivacyError, match="Adam stepped private parameters by itself"):
            bench.module.own.step(lambda: 0.0)
    with bench.guard.stepping(outer), pytest.raises(PrivacyError, match="stepped private parameters by itself"):
        outer.step()


def test_user_code_within_a_step_may_not_step(bench: Bench) -> None:
    """A closure runs inside of the expected step, before its gradient is private."""
    with bench.guard.stepping(bench.optimizer):
        with bench.guard.user_code(), pytest.raises(PrivacyError, match="stepped private parameters by itself"):
            bench.optimizer.step()
        bench.optimizer.step()


def test_guard_watches_from_start_to_stop(bench: Bench) -> None:
    bench.guard.start()  # a second call changes nothing
    bench.guard.stop()
    bench.optimizer.step()
    bench.guard.stop()
    bench.guard.start()
    with pytest.raises(PrivacyError, match="stepped private parameters by itself"):
        bench.optimizer.step()


def test_nested_sandboxes_count(bench: Bench) -> None:
    with bench.sandbox.enter():
        with bench.sandbox.enter():
            assert bench.guard.in_sandbox == 2
        with pytest.raises(PrivacyError, match="ran on trial"):
            bench.optimizer.step()
    assert bench.guard.in_sandbox == 0


def test_advice_names_what_to_call() -> None:
    assert "self.optimizers()" in USE_OPTIMIZERS
    assert "self.manual_backward" in USE_OPTIMIZERS


def test_paused_guard_watches_again_afterwards() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    guard = StepGuard(lambda optimizer: True)
    with guard.paused():
        optimizer.step()
    optimizer.step()  # it was not watching before
    guard.start()
    try:
        with guard.paused():
            optimizer.step()
        with pytest.raises(PrivacyError, match="SGD stepped private parameters by itself"):
            optimizer.step()
    finally:
        guard.stop()
