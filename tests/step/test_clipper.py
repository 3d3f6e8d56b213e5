"""Samples that run one at a time and are clipped together enter the sum once, each clipped alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.clipping import FlatClipping, PerLayerClipping
from lightning_dp.clipping.base import FactorClipping
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.step import PrivateStep
from tests import reference
from tests.step.rig import EXPECTED_BATCH_SIZE, KnownNoise, make_plan, make_settings, make_state

SAMPLES = torch.randn(70, 4, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, 70)[:, None]


def _step(clipping: FactorClipping, **options: Any) -> PrivateStep:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    return PrivateStep(
        module,
        [torch.optim.SGD(module.parameters(), lr=0.0)],
        settings=make_settings(microbatch_size=1, clipping=clipping),
        state=make_state(make_plan(clipping)),
        mechanisms=Mechanisms(),
        reduction=Reduction(),
        noise=KnownNoise(),  # type: ignore[arg-type]
        **options,
    )


def _run(step: PrivateStep, rows: Tensor, divisor: int = 1) -> None:
    for row in rows:
        with step.microbatch(1, divisor=divisor):
            (step.module(row[None]).sum() / divisor).backward()
            step.backward_done()
            step.collect(0)


def _sum(step: PrivateStep) -> Tensor:
    """The released sum without its noise."""
    step.finish(0)
    flat = torch.cat([parameter.grad.flatten() for parameter in step.module.parameters()])
    std = step.releases[0].drawn_std
    return flat * EXPECTED_BATCH_SIZE - KnownNoise.pattern(len(flat)) * std


def _expected(step: PrivateStep, rows: Tensor) -> Tensor:
    """The sum of the clipped gradients of samples, each by plain autograd."""
    grads = reference.per_sample_gradients(step.module, lambda i: step.module(rows[i : i + 1]).sum(), len(rows))
    accumulator = step.accumulators[0]
    norms = reference.squared_norms(grads, accumulator.groups, None).sqrt().float()
    factors = accumulator.clipping.factors(norms)
    parts = {
        name: torch.einsum("i,i...->...", row.double(), grads[name].double())
        for row, group in zip(factors, accumulator.groups, strict=True)
        for name in group
    }
    return torch.cat([parts[name].flatten() for name in accumulator.names]).float()


@pytest.mark.parametrize("clipping", [FlatClipping(1.0), PerLayerClipping(1.0, noise="equal")], ids=["flat", "layers"])
@pytest.mark.parametrize("num", [1, 3, 64, 70])
def test_clipper_adds_every_sample_once(num: int, clipping: FactorClipping) -> None:
    step = _step(clipping)
    step.begin(first_of_pass=True)
    _run(step, SAMPLES[-num:])
    torch.testing.assert_close(_sum(step), _expected(step, SAMPLES[-num:]), rtol=1e-4, atol=1e-4)


def test_clipper_clips_small_samples_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, own = [], FlatClipping.factors
    monkeypatch.setattr(FlatClipping, "factors", lambda self, norms: sizes.append(norms.shape[1]) or own(self, norms))
    step = _step(FlatClipping(1.0))
    step.begin(first_of_pass=True)
    _run(step, SAMPLES)
    assert sizes == [64]
    step.finish(0)
    assert sizes == [64, 6]


def test_clipper_scales_each_sample_by_its_own_divisor() -> None:
    step = _step(FlatClipping(1.0))
    step.begin(first_of_pass=True)
    _run(step, SAMPLES[:2])
    _run(step, SAMPLES[2:3], divisor=100)
    torch.testing.assert_close(_sum(step), _expected(step, SAMPLES[:3]), rtol=1e-4, atol=1e-4)


def test_clipper_drops_samples_of_an_abandoned_batch() -> None:
    step = _step(FlatClipping(1.0))
    step.begin(first_of_pass=True)
    _run(step, SAMPLES[:5])
    step.begin(first_of_pass=True)
    _run(step, SAMPLES[5:7])
    torch.testing.assert_close(_sum(step), _expected(step, SAMPLES[5:7]), rtol=1e-4, atol=1e-4)


def test_clipper_keeps_samples_over_a_dummy_and_a_zero_grad() -> None:
    """The second part of an accumulated batch may be empty; user code may call ``zero_grad`` between parts."""
    step = _step(FlatClipping(1.0))
    step.begin(first_of_pass=True)
    _run(step, SAMPLES[:2])
    with step.microbatch(1, weight=0.0):
        step.module(SAMPLES[9:10]).sum().backward()
        step.backward_done()
        step.collect(0)
    step.discard(0)
    torch.testing.assert_close(_sum(step), _expected(step, SAMPLES[:2]), rtol=1e-4, atol=1e-4)


def test_clipper_adds_at_once_under_manual_optimization() -> None:
    step = _step(FlatClipping(1.0), automatic=False)
    step.begin(first_of_pass=True)
    _run(step, SAMPLES[:1])
    assert not step._clipper._waiting
