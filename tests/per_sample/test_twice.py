"""Steps that differentiate a gradient: gradient penalties, differential equations, forces of molecules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy
from lightning_dp.errors import PrivacyError
from tests.helpers import make_trainer
from tests.per_sample.checks import assert_engine_agrees, make_engine, run_batch

Losses = Callable[[nn.Module, Tensor], Tensor]


def by_input(out: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return found


def penalty(module: nn.Module, x: Tensor) -> Tensor:
    """Loss of each sample: its output, and a penalty on the norm of its gradient."""
    x = x.clone().requires_grad_()
    out = module(x).flatten(1).sum(1)
    return (by_input(out, x).flatten(1).norm(dim=1) - 1).square() + out.sin()


def third(module: nn.Module, x: Tensor) -> Tensor:
    """Loss of each sample: third derivatives of its output."""
    x = x.clone().requires_grad_()
    out = module(x)
    for _ in range(3):
        out = by_input(out, x)[..., :2]
    return out.flatten(1).square().sum(1)


class Shared(nn.Module):
    """One weight in two places, once transposed, a functional use and a bare factor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return (((x @ self.weight.T) * self.gain).tanh() @ self.weight).sin()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.GroupNorm(2, 4), nn.Softplus(),
        nn.ConvTranspose2d(4, 2, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1),
    )  # fmt: skip


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Losses]] = {
    "penalty": (perceptron, (4,), penalty),
    "penalty of sequences": (perceptron, (3, 4), penalty),
    "third": (perceptron, (4,), third),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 1)), (4,), penalty),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1)), (4,), penalty),
    "convolutions": (convolutions, (2, 5, 5), penalty),
    "shared": (Shared, (4,), penalty),
}


@pytest.mark.parametrize("case", MODULES)
def test_second_derivatives_agree_with_batches_of_one(case: str) -> None:
    torch.manual_seed(0)
    make, shape, losses = MODULES[case]
    module, data = make(), torch.randn(6, *shape, dtype=torch.float64)
    module(data[:1].float())  # sets lazy shapes
    module.double()
    assert_engine_agrees(module, lambda x: losses(module, x), data, twice=True)


def test_a_backward_that_counts_may_create_no_graph() -> None:
    module, data = perceptron().double(), torch.randn(4, 4, dtype=torch.float64)
    engine = make_engine(module, lambda x: penalty(module, x), data, twice=True)
    engine.begin(4)
    with pytest.raises(PrivacyError, match="create_graph=True"):
        penalty(module, data).sum().backward(create_graph=True)


def test_input_changed_after_a_second_derivative_is_refused() -> None:
    module, data = perceptron().double(), torch.randn(4, 4, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        hidden = x.clone().requires_grad_()
        read = hidden * 1
        found = by_input(module(read), hidden).square().sum(1)
        read.data.add_(1)
        read.detach().add_(1)
        return found

    engine = make_engine(module, lambda x: penalty(module, x), data, twice=True)
    with pytest.raises(PrivacyError, match="modified in place"):
        run_batch(engine, loss, data, 4)


def test_recurrent_layers_refuse_second_derivatives() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.cells(x)[0]
            return out

    module, data = Net().double(), torch.randn(4, 5, 4, dtype=torch.float64)
    engine = make_engine(module, lambda x: module(x).flatten(1).sum(1), data, twice=True)
    engine.begin(4)
    with pytest.raises(PrivacyError, match="a recurrent layer of torch"):
        penalty(module, data)


class Model(L.LightningModule):
    """A penalty on the gradient with respect to the records, or forces of particles whose number differs."""

    def __init__(self, net: nn.Module, losses: Any) -> None:
        super().__init__()
        self.net, self.losses = net, losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(self.net, *batch).mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(module: L.LightningModule, loader: Any, way: str) -> Any:
    strategy = DPStrategy(noise_multiplier=0.0, seed=0, sampling="shuffle", grad_sample=way, max_grad_norm=0.1)  # type: ignore[arg-type]
    trainer = make_trainer(strategy, None, precision="64-true")
    trainer.fit(module, loader)
    return trainer


def particles(records: list[Any]) -> list[Tensor]:
    index = torch.cat([torch.full((len(record),), at) for at, record in enumerate(records)])
    return [torch.cat(records), index, torch.arange(len(records))]


def forces(net: nn.Module, x: Tensor, of: Tensor, which: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    energy = torch.zeros(len(which), dtype=x.dtype).index_add(0, of, net(x).squeeze(1))
    found = by_input(energy, x).square().sum(1)
    return energy + torch.zeros(len(which), dtype=x.dtype).index_add(0, of, found)


@pytest.mark.parametrize("what", ["penalty", "forces"])
@pytest.mark.one_in(2)
def test_gradient_penalties_train_by_rules(what: str) -> None:
    generator = torch.Generator().manual_seed(0)
    if what == "penalty":
        x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        loader, losses = DataLoader(TensorDataset(x), batch_size=4), penalty
    else:
        sets: Any = [torch.randn(1 + i % 4, 4, generator=generator, dtype=torch.float64) for i in range(12)]
        loader, losses = DataLoader(sets, batch_size=4, collate_fn=particles), forces  # type: ignore[assignment]
    found = []
    for way in ("rules", "single"):
        torch.manual_seed(0)
        module = Model(perceptron(), losses)
        train(module, loader, way)
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
