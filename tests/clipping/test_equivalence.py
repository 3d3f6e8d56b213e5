"""The R-dependent and the R-independent form of automatic clipping train the same model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_dp.clipping import AutomaticClipping

MakeOptimizer = Callable[[list[nn.Parameter], float, float], Optimizer]
# parameters, learning rate, weight decay
BY_RATE: dict[str, MakeOptimizer] = {
    "SGD": lambda p, lr, decay: SGD(p, lr=lr, weight_decay=decay),
    "momentum": lambda p, lr, decay: SGD(p, lr=lr, weight_decay=decay, momentum=0.9),
    "Nesterov": lambda p, lr, decay: SGD(p, lr=lr, weight_decay=decay, momentum=0.9, nesterov=True),
}
SCALE_FREE: dict[str, MakeOptimizer] = {
    "Adam": lambda p, lr, decay: Adam(p, lr=lr, eps=1e-14),
    "AMSGrad": lambda p, lr, decay: Adam(p, lr=lr, eps=1e-14, amsgrad=True),
    "AdamW": lambda p, lr, decay: AdamW(p, lr=lr, weight_decay=decay, eps=1e-14),
    "RMSprop": lambda p, lr, decay: RMSprop(p, lr=lr, eps=1e-14),
}


def train(clipping: AutomaticClipping, make: MakeOptimizer, lr: float, decay: float) -> Tensor:
    """Weights after 20 noisy steps on a linear regression of 32 samples, the same noise each time."""
    generator = torch.Generator().manual_seed(0)
    inputs_BP = torch.randn(32, 5, generator=generator, dtype=torch.float64)
    targets_B = inputs_BP @ torch.arange(5.0, dtype=torch.float64) + 0.1
    weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = make([weight], lr, decay)
    for _ in range(20):
        grads_BP = 2 * (inputs_BP @ weight.detach() - targets_B)[:, None] * inputs_BP
        factors_B = clipping.factors(grads_BP.norm(dim=1)[None])[0]
        noisy = (factors_B[:, None] * grads_BP).sum(0)
        noisy += clipping.sensitivity(1) * torch.randn(5, generator=generator, dtype=torch.float64)
        weight.grad = torch.empty_like(noisy)
        clipping.finish(noisy, 32, weight.grad)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("bound", [0.1, 3.0, 50.0])
@pytest.mark.parametrize("gamma", [0.01, 0.0], ids=["AUTO-S", "AUTO-V"])
@pytest.mark.parametrize("name", BY_RATE)
def test_bound_is_a_learning_rate_and_an_inverse_weight_decay(name: str, gamma: float, bound: float) -> None:
    dependent = train(AutomaticClipping(gamma, bound), BY_RATE[name], 0.5 / bound, 0.1 * bound)
    independent = train(AutomaticClipping(gamma), BY_RATE[name], 0.5, 0.1)
    torch.testing.assert_close(dependent, independent, rtol=1e-6, atol=1e-9)
    assert float((dependent - train(AutomaticClipping(gamma), BY_RATE[name], 0.5, 0.0)).abs().max()) > 1e-2


@pytest.mark.parametrize("bound", [0.1, 3.0, 50.0])
@pytest.mark.parametrize("gamma", [0.01, 0.0], ids=["AUTO-S", "AUTO-V"])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_bound_cancels_under_an_adaptive_optimizer(name: str, gamma: float, bound: float) -> None:
    dependent = train(AutomaticClipping(gamma, bound), SCALE_FREE[name], 0.1, 0.1)
    independent = train(AutomaticClipping(gamma), SCALE_FREE[name], 0.1, 0.1)
    torch.testing.assert_close(dependent, independent, rtol=1e-6, atol=1e-9)
    assert float(independent.abs().max()) > 0.1
