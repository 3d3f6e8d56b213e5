"""Complex parameters: an entry is two real coordinates, each clipped and noised as such."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy
from lightning_dp.callbacks import MagnitudePruning, RandomSparsification
from tests.helpers import make_trainer

NUM, MODES, WIDTH, BOUND = 12, 5, 16, 0.7


class SpectralLayer(nn.Module):
    """Multiplies the lowest frequencies of each channel by complex weights, next to a pointwise map."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(width, width, MODES, dtype=torch.cfloat))
        self.bias = nn.Parameter(torch.zeros(2))
        self.point = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.fft.rfft(x)[..., :MODES]
        out = torch.fft.irfft(torch.einsum("bim,iom->bom", low, self.weight), n=WIDTH)
        return torch.nn.functional.gelu(out + self.point(x)) + self.bias[0]


class Operator(L.LightningModule):
    def __init__(self, rate: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers, self.rate = nn.Sequential(SpectralLayer(), SpectralLayer()), rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layers(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.02, 2, NUM)[:, None, None]
    return TensorDataset(*(scales * torch.randn(NUM, 3, WIDTH, generator=generator) for _ in range(2)))


def train(module: L.LightningModule, *callbacks: Any, steps: int = 1, **more: Any) -> DPStrategy:
    settings: Any = {"noise_multiplier": 1.0, "max_grad_norm": BOUND, "target_delta": 1e-3, "sampling": "shuffle"}
    strategy = DPStrategy(**(settings | more))
    make_trainer(strategy, None, max_epochs=-1, max_steps=steps, callbacks=list(callbacks)).fit(
        module, DataLoader(data(), batch_size=NUM)
    )
    return strategy


def test_step_is_that_of_single_samples() -> None:
    module, plain = Operator(), Operator()
    grads, norms = [], []
    for x, y in data():
        plain.zero_grad()
        plain.training_step((x[None], y[None]), 0).backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in plain.parameters()])
        norms.append(float(sum(g.abs().square().sum() for g in grads[-1]) ** 0.5))
    bound = sorted(norms)[NUM // 2] * 0.99
    train(module, noise_multiplier=1e-9, max_grad_norm=bound)
    factors = [min(1.0, bound / norm) / NUM for norm in norms]
    for index, (new, old) in enumerate(zip(module.parameters(), plain.parameters(), strict=True)):
        change = sum(factor * each[index] for factor, each in zip(factors, grads, strict=True))
        torch.testing.assert_close(new, old - change, rtol=1e-5, atol=1e-6)


class Wide(Operator):
    """Has many complex weights that no record touches."""

    def __init__(self) -> None:
        super().__init__()
        self.far = nn.Parameter(torch.zeros(40_000, dtype=torch.cfloat))


def test_real_and_imaginary_part_carry_the_noise_of_a_coordinate() -> None:
    module = Wide()
    train(module, noise_multiplier=2.0)
    far, std = module.far.detach(), 2.0 * BOUND / NUM
    assert float(far.real.std()) == pytest.approx(std, rel=0.02)
    assert float(far.imag.std()) == pytest.approx(std, rel=0.02)
    assert abs(float((far.real * far.imag).mean())) < 0.02 * std**2


@pytest.mark.parametrize("mask", [RandomSparsification(final_rate=0.5, schedule="constant"), MagnitudePruning(0.5)])
@pytest.mark.one_in(2)
def test_both_numbers_of_an_entry_are_masked_together(mask: Any) -> None:
    module = Wide() if isinstance(mask, RandomSparsification) else Operator()
    train(module, mask, steps=2)
    weights = module.far if isinstance(module, Wide) else module.layers[0].weight
    real, imaginary = weights.real != 0, weights.imag != 0
    assert torch.equal(real, imaginary)
    assert 0.3 < float(real.float().mean()) < 0.95


def test_rules_follow_complex_weights() -> None:
    train(Operator(), grad_sample="rules")


def test_adam_and_later_checks_run() -> None:
    class Adam(Operator):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    assert train(Adam(), steps=3).steps_taken == 3
