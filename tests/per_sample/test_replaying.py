"""A ``torch.autograd.Function`` of samples and private parameters: it runs again for each sample."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import make_trainer


class Scale(torch.autograd.Function):
    """A product with a weight, whose gradient is summed over all other axes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, power: int) -> Any:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] * weight, (grads[0] * x).flatten(0, -2).sum(0), None


class Centred(Scale):
    """The same less the mean of the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, power: int) -> Any:
        return Scale.forward(ctx, x - x.mean(0), weight, power)


class Rounded(Scale):
    """The same, rounded up or down at random."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, power: int) -> Any:
        return (Scale.forward(ctx, x, weight, power) * 4 + torch.rand_like(x)).floor() / 4


class Both(Scale):
    """The same with a second result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, power: int) -> Any:
        return Scale.forward(ctx, x, weight, power), x.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return Scale.backward(ctx, grads[0])


class Model(L.LightningModule):
    """Two layers with a function between them; samples may be along the second axis there."""

    def __init__(self, function: Any, second: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.weight, self.head = nn.Linear(3, 5), nn.Parameter(torch.rand(5) + 0.5), nn.Linear(5, 1)
        self.function, self.second = function, second

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.first(batch[0])
        made = self.function.apply(x.transpose(0, 1) if self.second else x, self.weight, 1)
        made = made[0] if isinstance(made, tuple) else made
        return self.head(made.transpose(0, 1) if self.second else made).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(model: L.LightningModule, **options: Any) -> str:
    torch.manual_seed(1)
    strategy = DPStrategy(noise_multiplier=0.0, seed=0, sampling="shuffle", max_grad_norm=0.3, **options)
    loader = DataLoader(TensorDataset(torch.randn(12, 4, 3)), batch_size=4)
    make_trainer(strategy, None, max_epochs=1).fit(model, loader)
    return "single" if strategy.state.runs_alone else "rules"


@pytest.mark.parametrize("second", [False, True])
def test_a_function_runs_again_for_each_sample(second: bool) -> None:
    model, alone = Model(Scale, second), Model(Scale, second)
    assert fit(model) == "rules"
    fit(alone, grad_sample="single")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, alone.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert "apply" not in vars(Scale)


@pytest.mark.parametrize("function", [Rounded, Both])
def test_a_function_that_cannot_run_again_runs_alone(function: Any) -> None:
    assert fit(Model(function)) == "single"


def test_a_function_that_mixes_samples_is_refused() -> None:
    with pytest.raises(PrivacyError, match="The gradient of a batch is not that of its records alone"):
        fit(Model(Centred))
