"""What a user's code may do around the uses of private parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.tracking.nodes import Reporting
from tests import reference
from tests.per_sample.checks import assert_close, assert_engine_agrees, make_engine, run_batch


def _loss(module: nn.Module):
    return lambda x: module(x).square().flatten(1).sum(1)


def _data(*shape: int) -> Tensor:
    return torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers with something between or around them."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "keyword":
            return self.second(input=self.first(input=x).relu())
        if self.how == "keywords of products":
            hidden = torch.matmul(input=x, other=self.first.weight.t()) + torch.zeros_like(input=self.first.bias)
            return torch.tensordot(a=hidden.relu(), b=self.second.weight.t(), dims=1) + self.second.bias
        if self.how == "in place":
            return self.second(F.relu_(self.first(x)))
        if self.how == "in place on the second":
            return F.leaky_relu_(self.second(self.first(x).tanh()), 0.1)
        if self.how == "in place on a view":
            hidden = self.first(x)
            hidden.view(-1)[:1].mul_(1.0)
            return self.second(hidden.mul_(2).tanh())
        if self.how == "used twice":
            hidden = self.first(x)
            return self.second(hidden.tanh()) + self.second(hidden)
        if self.how == "no backward":
            self.second(self.first(x))
            return self.second(self.first(x).tanh())
        if self.how == "no grad":
            with torch.no_grad():
                teacher = self.second(self.first(x))
            return self.second(self.first(x).tanh()) - teacher
        if self.how == "detached":
            return self.second(self.first(x).detach().tanh())
        if self.how == "input with grad":
            return self.second(self.first(x.clone().requires_grad_()).tanh())
        if self.how == "checkpoint":
            return checkpoint(lambda x: self.second(self.first(x).tanh()), x, use_reentrant=False)
        if self.how == "checkpoint of the second":
            return checkpoint(self.second, self.first(x).tanh(), use_reentrant=False)
        if self.how == "reentrant checkpoint":
            return checkpoint(lambda x: self.second(self.first(x).relu()), x.requires_grad_(), use_reentrant=True)
        if self.how == "exception":
            try:
                self.first(x.flatten()[:1])
            except RuntimeError:
                assert isinstance(self.first.weight, nn.Parameter)
            return self.second(self.first(x).tanh())
        return self.second(self.first(x).relu())


HOWS = [
    "plain",
    "keyword",
    "keywords of products",
    "in place",
    "in place on the second",
    "in place on a view",
    "used twice",
    "no backward",
    "no grad",
    "detached",
    "input with grad",
    "checkpoint",
    "checkpoint of the second",
    "reentrant checkpoint",
]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
@pytest.mark.parametrize("with_backward", [False, True])
@pytest.mark.one_in(3)
def test_recording_survives(how: str, shape: tuple[int, ...], with_backward: bool) -> None:
    torch.manual_seed(0)
    module = Net(how)
    data, loss = _data(*shape), _loss(module)

    def single(x: Tensor) -> Tensor:
        # autograd.grad, which the reference uses, cannot see into a reentrant checkpoint
        module.how = "plain" if how == "reentrant checkpoint" else how
        result = loss(x)
        module.how = how
        return result

    assert_engine_agrees(module, loss, data, with_backward=with_backward, single_loss=single)


def test_recording_restores_parameters_after_an_exception() -> None:
    module = Net("exception")
    engine = make_engine(module, _loss(Net()), _data(3))
    engine.learn_layout(lambda size: module(_data(3)[:2].repeat(3, 1)[:size]))
    run_batch(engine, _loss(module), _data(3), 4)
    grads = engine.per_sample_gradients()
    engine.end()
    expected = reference.per_sample_gradients(module, lambda i: _loss(module)(_data(3)[i : i + 1]).sum(), 4)
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1.0, 1e-9, name)


def test_recording_puts_back_what_an_interrupt_left_replaced() -> None:
    class Interrupt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 3))
            self.stop = False

        def forward(self, x: Tensor) -> Tensor:
            if self.stop:
                raise KeyboardInterrupt("stop")
            return x * self.scale

    module = Interrupt()
    engine = make_engine(module, _loss(module), torch.randn(4, 3))
    scale = module.scale
    module.stop = True
    engine.begin(2)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        module(torch.randn(2, 3))
    assert isinstance(module.scale, Reporting)
    engine.end()
    assert module.scale is scale
    assert type(scale) is nn.Parameter


@pytest.mark.parametrize("late", [False, True])
def test_recording_sees_what_a_users_hooks_change(late: bool) -> None:
    """Hooks that change inputs and outputs, registered before or after ours."""
    module = Net()

    def add_hooks() -> None:
        module.second.register_forward_pre_hook(lambda m, args: (args[0] * 3,))
        module.second.register_forward_hook(lambda m, args, output: output * output)

    if not late:
        add_hooks()
    engine = make_engine(module, _loss(module), _data(3))
    if late:
        add_hooks()
    run_batch(engine, _loss(module), _data(3), 4)
    grads = engine.per_sample_gradients()
    engine.end()
    expected = reference.per_sample_gradients(module, lambda i: _loss(module)(_data(3)[i : i + 1]).sum(), 4)
    for name, grad in grads.items():
        assert_close(grad, expected[name], float(grad.abs().max()), 1e-9, name)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("first", ["linear", "conv", "embedding"])
def test_inplace_activation_right_after_the_first_layer(inplace: bool, first: str) -> None:
    torch.manual_seed(0)
    layer = {"linear": nn.Linear(4, 3), "conv": nn.Conv1d(2, 3, 2), "embedding": nn.Embedding(5, 3)}[first]
    data = torch.randint(0, 5, (6, 4)) if first == "embedding" else _data(4) if first == "linear" else _data(2, 5)
    module = nn.Sequential(layer, nn.ReLU(inplace=inplace), nn.Flatten(), nn.LazyLinear(2)).double()
    module(data)
    assert_engine_agrees(module, _loss(module), data)


def test_an_old_gradient_is_no_offence() -> None:
    """The noisy gradient of the last step is still there when the next batch begins."""
    module = Net()
    engine = make_engine(module, _loss(module), _data(3))
    old = torch.ones_like(module.first.weight)
    module.first.weight.grad = old
    run_batch(engine, _loss(module), _data(3), 4)
    assert module.first.weight.grad is old


def test_public_and_frozen_parameters_keep_plain_autograd() -> None:
    module = Net()
    module.first.bias.requires_grad_(False)
    engine = make_engine(module, _loss(module), _data(3), names=["second.weight"])
    run_batch(engine, _loss(module), _data(3), 4)
    grads = engine.per_sample_gradients()
    engine.end()
    assert set(grads) == {"second.weight"}
    assert module.second.weight.grad is None
    assert module.first.bias.grad is None
    expected = reference.per_sample_gradients(module, lambda i: _loss(module)(_data(3)[i : i + 1]).sum(), 4)
    assert_close(grads["second.weight"], expected["second.weight"], 1.0, 1e-9, "second.weight")
    assert module.first.weight.grad is not None
    assert_close(module.first.weight.grad, expected["first.weight"].sum(0), 1.0, 1e-9, "first.weight")


def test_parameters_may_change_between_steps() -> None:
    module = Net()
    engine = make_engine(module, _loss(module), _data(3), names=["second.weight"])
    engine.set_parameters({"second.weight": module.second.weight})  # type: ignore[dict-item]
    assert engine.has_layout
    engine.set_parameters(dict(module.named_parameters()))
    assert not engine.has_layout
    with pytest.raises(PrivacyError, match="learn_layout before begin"):
        engine.begin(2)
    engine.learn_layout(lambda size: module(_data(3)[:2].repeat(3, 1)[:size]))
    run_batch(engine, _loss(module), _data(3), 4)
    assert module.first.weight.grad is None
    engine.set_parameters({"first.bias": module.first.bias})
    assert engine.has_layout
    run_batch(engine, _loss(module), _data(3), 4)
    assert module.second.weight.grad is not None
