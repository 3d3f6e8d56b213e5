"""Rules that users register: one contract, for a function, an autograd function and a rule that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy
from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import check_rule, register_rule
from lightning_dp.per_sample.tracking.operations import operation_of
from tests.helpers import make_trainer
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
@pytest.mark.one_in(3)
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
    with pytest.raises(PrivacyError, match=r"\['bias', 'weight'\]: the torch.autograd.Function Affine"):
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


def test_named_arguments_and_built_in_rules_stay_as_they_were() -> None:
    class Angle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return torch.atan2(other=self.layer.bias, input=self.layer(x))

    def angle(values: Any, backprop: Tensor) -> dict[str, Tensor]:
        return {"other": -backprop * values["input"] / (values["input"].square() + values["other"].square())}

    known = [operation_of(nn.functional.linear), operation_of(torch.atan2)]
    removes = [
        register_rule(torch.atan2, angle, arguments=("input", "other"), parameters=("other",)),
        register_rule(nn.functional.linear, angle, arguments=("input", "other"), parameters=("other",)),
    ]
    removes.pop()()
    module = Angle()
    assert_engine_agrees(module, lambda x: module(x).square().sum(1), DATA[:, 0], size=4)
    removes.pop()()
    assert [operation_of(nn.functional.linear), operation_of(torch.atan2)] == known


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


ARGUMENTS = torch.randn(5, 3, 2), torch.randn(2, 4), torch.randn(4), 2.0


def with_rule(found: Any, arguments: tuple[str, ...] = ("x", "weight", "bias", "scale")) -> Callable[[], None]:
    return register_rule(Affine, found, arguments=arguments, parameters=("weight", "bias"))


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Any, Tensor], Any]:
    return lambda values, backprop: change(dict(gradients(values, backprop)))


WRONG: dict[str, tuple[Any, str]] = {
    "a factor": (changed(lambda g: {n: 2 * t for n, t in g.items()}), "for 'weight' 2 times that of row 0"),
    "another row": (changed(lambda g: g | {"bias": g["bias"].roll(1, 0)}), "for 'bias' another than that of row 0"),
    "a sum": (changed(lambda g: g | {"bias": g["bias"].sum(0)}), r"'bias' of shape \(5, 4\), got \(4,\)"),
    "in place": (
        lambda values, backprop: gradients(values, backprop.mul_(2)),
        "Affine changed its values or its backprop",
    ),
    "none": (lambda values, backprop: None, r"'weight' of shape \(5, 2, 4\), got nothing"),
    "a tuple": (changed(lambda g: tuple(g.values())), r"got tuple. The rule for Affine returns a dictionary"),
    "a name": (
        lambda values, backprop: values["input"],
        r"rule for Affine raised KeyError: 'input'. It was given values",
    ),
}


@pytest.mark.usefixtures("registered")
def test_a_right_rule_passes_its_check() -> None:
    check_rule(Affine, *ARGUMENTS)
    check_rule(Affine, ARGUMENTS[0][:, 0].double(), *(one.double() for one in ARGUMENTS[1:3]), 2.0)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_rule_fails_its_check(what: str) -> None:
    found, message = WRONG[what]
    remove = with_rule(found)
    try:
        with pytest.raises(ValueError, match=message):
            check_rule(Affine, *ARGUMENTS)
    finally:
        remove()
    with pytest.raises(ValueError, match=r"Expected an operation with a registered rule, got .*Affine"):
        check_rule(Affine, *ARGUMENTS)


class Trained(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net().float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("way", ["auto", "rules"])
@pytest.mark.parametrize("what", ["a factor", "another row"])
def test_a_wrong_rule_does_not_train(what: str, way: Any) -> None:
    remove = with_rule(WRONG[what][0])
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, grad_sample=way)
    try:
        with pytest.raises(ValueError, match=r"registered rules for Affine to return the gradient of each row, got"):
            make_trainer(strategy, None).fit(Trained(), DataLoader(TensorDataset(DATA.float()), batch_size=3))
    finally:
        remove()
    assert strategy.steps_taken == 0


@pytest.mark.parametrize("operation", [3, "linear", nn.Linear])
def test_what_is_no_operation_gets_no_rule(operation: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected a function, or a subclass of torch.autograd.Function"):
        register_rule(operation, gradients, arguments=("x", "weight"), parameters=("weight",))


def test_a_rule_names_all_arguments() -> None:
    remove = with_rule(gradients, ("x", "weight", "bias"))
    try:
        with pytest.raises(ValueError, match="to name all 4 arguments of Affine, got arguments="):
            check_rule(Affine, *ARGUMENTS)
    finally:
        remove()
