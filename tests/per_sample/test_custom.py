"""Rules that users register: one contract, for a function, an autograd function and a rule that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import register_rule
from tests.per_sample.checks import assert_engine_agrees, make_engine, run_batch

DATA = torch.randn(6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Affine(torch.autograd.Function):
    """``x W + b`` in a function that torch does not follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return scale * (x @ weight + bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad = ctx.scale * grads[0]
        return grad @ weight.mT, torch.einsum("...i,...o->io", x, grad), grad.flatten(0, -2).sum(0), None


def gradients(values: Any, backprop: Tensor) -> dict[str, Tensor]:
    rows = len(backprop)
    grad = values["scale"] * backprop.reshape(rows, -1, backprop.shape[-1])
    return {"weight": values["x"].reshape(rows, -1, values["x"].shape[-1]).mT @ grad, "bias": grad.sum(1)}


class Net(nn.Module):
    def __init__(self, how: str = "batch first") -> None:
        super().__init__()
        self.how = how
        self.before = nn.Linear(3, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(2, 3, 2)), nn.Parameter(torch.randn(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).tanh()
        if self.how == "batch second":
            return Affine.apply(x.transpose(0, 1), self.weight[0], self.bias, 2.0).transpose(0, 1)
        if self.how == "folded":
            return Affine.apply(x.flatten(0, 1), self.weight[0], self.bias, 2.0).view(len(x), 4, 2)
        if self.how == "functions of parameters":
            return Affine.apply(x, self.weight[0].tanh(), self.bias * 2, 2.0)
        if self.how == "twice":
            return Affine.apply(x, self.weight[0], self.bias, 2.0) + Affine.apply(x, self.weight[1], self.bias, 1.0)
        if self.how == "one frozen":
            return Affine.apply(x, self.weight[0].detach(), self.bias, 2.0)
        return Affine.apply(x, self.weight[0], self.bias, 2.0)


@pytest.fixture
def registered() -> Iterator[None]:
    remove = register_rule(Affine, gradients, arguments=("x", "weight", "bias", "scale"), parameters=("weight", "bias"))
    yield
    remove()


def loss_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).square().sum((1, 2))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("options", [{}, {"memory": "lean"}, {"grad_sample": "materialize"}], ids=str)
@pytest.mark.parametrize(
    "how", ["batch first", "batch second", "folded", "functions of parameters", "twice", "one frozen"]
)
def test_a_registered_rule_meets_the_contract(how: str, options: dict[str, Any]) -> None:
    """Gradients, norms, masks and weighted sums of batches of one, for every size."""
    torch.manual_seed(0)
    module = Net(how)
    for size in (0, 1, 4, 6):
        assert_engine_agrees(module, loss_of(module), DATA, size=size, **options)


@pytest.mark.usefixtures("registered")
def test_a_bad_sample_reaches_no_other() -> None:
    module, data = Net(), DATA.clone()
    engine = make_engine(module, loss_of(module), DATA)
    data[1] = torch.nan
    run_batch(engine, loss_of(module), data, 6)
    names = [name for name, _ in module.named_parameters()]
    norms = engine.squared_norms([names])
    assert norms.isfinite().tolist() == [[True, False, True, True, True, True]]
    out = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    engine.accumulate(norms.isfinite().double(), [names], out)
    assert all(total.isfinite().all() for total in out.values())


def test_without_its_rule_an_autograd_function_is_refused_again() -> None:
    own = Affine.apply
    remove = register_rule(Affine, gradients, arguments=("x", "weight", "bias", "scale"), parameters=("weight", "bias"))
    assert Affine.apply is not own
    remove()
    module = Net()
    engine = make_engine(module, loss_of(module), DATA)
    with pytest.raises(PrivacyError, match=r"\['bias', 'weight'\]: a torch.autograd.Function"):
        run_batch(engine, loss_of(module), DATA, 4)


def test_a_rule_for_a_torch_function() -> None:
    """In place of the map over the samples that the operation has without it."""
    asked: list[torch.Size] = []

    def distances(values: Any, backprop: Tensor) -> dict[str, Tensor]:
        asked.append(backprop.shape)
        apart = values["x2"] - values["x1"].unsqueeze(-2)
        return {"x2": (backprop.unsqueeze(-1) * apart.sign()).sum(1)}

    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.centres, 1.0)

    module = Centres()
    assert_engine_agrees(module, loss_of(module), DATA, size=4)
    assert not asked
    remove = register_rule(torch.cdist, distances, arguments=("x1", "x2", "p"), parameters=("x2",))
    try:
        assert_engine_agrees(module, loss_of(module), DATA, size=4)
    finally:
        remove()
    assert set(asked) == {torch.Size([4, 4, 5])}


@pytest.mark.parametrize(
    ("found", "got"), [({}, "nothing"), ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"\(3, 2\)|\(2,\)")]
)
def test_a_rule_that_returns_something_else_is_named(found: dict[str, Tensor], got: str) -> None:
    remove = register_rule(
        Affine,
        lambda values, backprop: found,
        arguments=("x", "weight", "bias", "scale"),
        parameters=("weight", "bias"),
    )
    try:
        module = Net()
        engine = make_engine(module, loss_of(module), DATA)
        run_batch(engine, loss_of(module), DATA, 4)
        with pytest.raises(ValueError, match=f"Expected a registered rule to return .*got ({got})"):
            engine.squared_norms([["weight", "bias"]])
    finally:
        remove()


@pytest.mark.parametrize("parameters", [(), ("weights",)])
def test_a_rule_needs_parameters_among_its_arguments(parameters: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="Expected parameters among arguments"):
        register_rule(Affine, gradients, arguments=("x", "weight"), parameters=parameters)
