"""Backwards: several, forgotten, foreign, refused, and uses of a parameter that no record sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.errors import PrivacyError
from tests import reference
from tests.per_sample.checks import assert_close, assert_engine_agrees, make_engine, run_batch
from tests.per_sample.test_uses import Net, _data, _loss


def test_several_backwards_add_up() -> None:
    """retain_graph, two losses on one graph, and two graphs (a discriminator on real and fake)."""
    module, data = Net(), _data(3)

    def losses(x: Tensor) -> list[Tensor]:
        real, fake = module(x), module(-x)
        return [real.square().sum(), real.sum(), fake.sin().sum()]

    def total(x: Tensor) -> Tensor:
        real, same, fake = losses(x)
        return real + real + same + fake

    engine = make_engine(module, total, data)
    engine.begin(5)
    real, same, fake = losses(data[:5])
    real.backward(retain_graph=True)
    real.backward(retain_graph=True)
    same.backward()
    fake.backward()
    engine.check_tracked()
    grads = engine.per_sample_gradients()
    engine.end()
    expected = reference.per_sample_gradients(module, lambda i: total(data[i : i + 1]), 5)
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1.0, 1e-9, name)


def test_two_losses_may_share_the_copies_of_a_parameter() -> None:
    """Their graphs are apart, so neither backward needs ``retain_graph``; a first one may be discarded."""
    gain = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.randn(3, dtype=torch.float64))})
    data = _data(3)
    one, two = (lambda x: (x * gain["w"]).sin().sum(1)), (lambda x: (x.exp() * gain["w"]).square().sum(1))
    both, second = (
        reference.per_sample_gradients(
            gain, lambda i, left=left: (left * one(data[i : i + 1]) + two(data[i : i + 1])).sum(), 5
        )
        for left in (1, 0)
    )
    engine = make_engine(gain, lambda x: one(x) + two(x), data)
    for expected in (both, second):
        engine.begin(5)
        losses = one(data[:5]).sum(), two(data[:5]).sum()
        losses[0].backward()
        if expected is second:
            engine.discard()
        losses[1].backward()
        engine.check_tracked()
        assert_close(engine.per_sample_gradients()["w"], expected["w"], 1.0, 1e-9, "w")
        engine.end()


def test_discard_forgets_what_came_and_keeps_what_is_to_come() -> None:
    module, data = Net(), _data(3)
    one = reference.per_sample_gradients(module, lambda i: module(data[i : i + 1]).sum(), 4)
    two = reference.per_sample_gradients(module, lambda i: module(data[i : i + 1]).square().sum(), 4)
    engine = make_engine(module, _loss(module), data)
    engine.begin(4)
    output = module(data[:4])
    output.sum().backward(retain_graph=True)
    assert engine.has_backprops(["first.weight"])
    engine.discard(["first.weight", "second.bias"])
    assert not engine.has_backprops(["first.weight", "second.bias"])
    assert engine.has_backprops(["first.bias"])
    output.square().sum().backward()
    names = list(one)
    for materialised in (engine.per_sample_gradients(), None):
        norms = engine.squared_norms([[name] for name in names])
        for row, name in enumerate(names):
            expected = two[name] if name in ("first.weight", "second.bias") else one[name] + two[name]
            assert_close(norms[row], expected.square().flatten(1).sum(1), 1.0, 1e-9, name)
            if materialised is not None:
                assert_close(materialised[name], expected, 1.0, 1e-9, name)
    engine.discard()
    assert not engine.squared_norms([names]).any()


def test_a_backward_that_is_not_the_loss_can_be_left_out() -> None:
    module, data = Net(), _data(3)
    engine = make_engine(module, _loss(module), data)
    engine.begin(4)
    x = data[:4].clone().requires_grad_()
    engine.listening = False
    (direction,) = torch.autograd.grad(module(x).sum(), x)
    engine.listening = True
    assert not engine.has_backprops(list(dict(module.named_parameters())))
    module(data[:4] + direction.sign()).square().sum().backward()
    assert engine.has_backprops(["first.weight"])


def test_second_derivatives_are_refused() -> None:
    module, data = Net(), _data(3)
    engine = make_engine(module, _loss(module), data)
    engine.begin(4)
    x = data[:4].clone().requires_grad_()
    with pytest.raises(PrivacyError, match="create_graph=True"):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)


def test_a_graph_of_an_earlier_microbatch_is_refused() -> None:
    module, data = Net(), _data(3)
    engine = make_engine(module, _loss(module), data)
    engine.begin(4)
    carried = module(data[:4]).sum()
    engine.begin(4)
    with pytest.raises(PrivacyError, match="this microbatch only"):
        carried.backward()


def test_an_input_modified_in_place_is_refused() -> None:
    module = Net()

    def loss(x: Tensor) -> Tensor:
        hidden = x.clone()
        output = module(hidden)
        hidden.mul_(2)
        return output.sum(1)

    engine = make_engine(module, loss, _data(3))
    with pytest.raises(PrivacyError, match="modified in place"):
        run_batch(engine, loss, _data(3), 4)


class Hidden(torch.autograd.Function):
    """A sum of weights that torch does not let anybody follow."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.shape = weight.shape
        return torch.tensor(weight.sum().item(), dtype=weight.dtype)  # no operation on weights gives this tensor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].expand(ctx.shape)


@pytest.mark.parametrize("how", ["of a parameter", "of a function of it", "after accumulation"])
def test_untracked_use_is_found_and_leaves_no_raw_gradient(how: str) -> None:
    module = Net()
    weight = module.first.weight

    def loss(x: Tensor) -> Tensor:
        return module(x).sum(1) + Hidden.apply(module.first.weight * 2 if "function" in how else module.first.weight)

    engine = make_engine(module, loss, _data(3))
    if how == "after accumulation":
        weight.grad = torch.zeros_like(weight)
    with pytest.raises(PrivacyError, match=r"\['first.weight'\].*grad_sample='single'"):
        run_batch(engine, loss, _data(3), 4)
    assert weight.grad is None


def test_raw_gradient_of_an_untracked_use_reaches_no_hook() -> None:
    module = Net()
    engine = make_engine(module, _loss(module), _data(3))
    engine.begin(4)
    (module(_data(3)[:4]).sum() + Hidden.apply(module.first.weight)).backward()
    assert module.first.weight.grad is None
    with pytest.raises(PrivacyError, match="another use"):
        engine.check_tracked()


@pytest.mark.parametrize("how", ["functional", "penalty of each loss"])
def test_uses_outside_of_layers_count(how: str) -> None:
    module = Net()

    def loss(x: Tensor) -> Tensor:
        if how == "functional":
            return F.linear(module.first(x), module.second.weight).sum(1)
        return module(x).sum(1) + module.first.weight.square().sum()

    assert_engine_agrees(module, loss, _data(3))


def test_parameters_switched_off_for_a_pass_get_nothing_from_it() -> None:
    """A generator's loss goes through the discriminator; ``toggle_optimizer`` keeps it from training on that."""
    module, data = Net(), _data(3)
    expected = reference.per_sample_gradients(module, lambda i: _loss(module)(data[i : i + 1]).sum(), 4)
    engine = make_engine(module, _loss(module), data)
    engine.begin(4)
    module.second.requires_grad_(False)
    module.first.bias.requires_grad_(False)
    _loss(module)(data[:4]).sum().backward()
    engine.check_tracked()
    assert not engine.has_backprops(["second.weight", "second.bias", "first.bias"])
    module.requires_grad_(True)
    once = engine.per_sample_gradients()
    norms = engine.squared_norms([["first.weight"], ["first.bias"]])
    assert_close(once["first.weight"], expected["first.weight"], 1.0, 1e-9, "first.weight")
    assert torch.equal(norms[0] > 0, expected["first.weight"].flatten(1).any(1))
    assert norms[0].any()
    assert not norms[1].any()
    _loss(module)(data[:4]).sum().backward()
    twice = engine.per_sample_gradients()
    for name, grad in twice.items():
        assert_close(grad, expected[name] * (2 if name == "first.weight" else 1), 1.0, 1e-9, name)


class ByInputs(nn.Module):
    """A feature that is the gradient of an energy by the inputs, which gives the weights of the energy nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.head = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.energy(inputs).tanh().square().sum(), inputs)
        return torch.cat([self.head(x + force), self.energy(x)], 1)


def test_gradients_by_inputs_give_weights_nothing() -> None:
    module = ByInputs().double()
    assert_engine_agrees(module, lambda x: module(x).square().sum(1), torch.randn(5, 3, dtype=torch.float64))
