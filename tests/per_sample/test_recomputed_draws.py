"""Modules without a rule that draw random numbers: norm and sum are those of one draw."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine
from tests.per_sample.checks import make_engine, run_batch

OWN_PYTHON, OWN_TORCH = random.Random(0), torch.Generator().manual_seed(0)
GLOBAL: dict[str, Callable[[], float]] = {"random": random.random, "numpy": lambda: np.random.random()}  # noqa: NPY002
OWN: dict[str, Callable[[], float]] = {
    "own random": OWN_PYTHON.random,
    "own torch": lambda: float(torch.rand((), generator=OWN_TORCH)),
}


class Drops(nn.Module):
    """A layer that is left out by chance, as in LayerDrop; without it the gradient is 100,000 times as large."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((6,), 0.1))
        self.draw = draw
        self.dropped: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.draw() < 0.5
        if self.training:
            self.dropped.append(dropped)
        return x * self.gain * (1e5 if dropped else 1.0)


def loss_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).sum(1)


def drawing(draw: Callable[[], float], memory: str) -> tuple[Drops, PerSampleEngine]:
    module = Drops(draw)
    return module, make_engine(module, loss_of(module), torch.rand(4, 6), memory=memory)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("name", GLOBAL | OWN)
def test_a_drawing_module_adds_no_more_than_the_bound(name: str, memory: str) -> None:
    """Norm of one draw and sum of another: 100,000 times the bound."""
    module, engine = drawing((GLOBAL | OWN)[name], memory)
    for _ in range(20):
        run_batch(engine, loss_of(module), torch.rand(1, 6) + 0.5, 1)
        norms = engine.squared_norms([["gain"]]).sqrt()
        out = {"gain": torch.zeros(6)}
        engine.accumulate((1 / norms).clamp(max=1.0), [["gain"]], out)
        assert float(out["gain"].norm()) <= 1 + 1e-5


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("name", GLOBAL)
def test_a_module_is_recomputed_with_the_draws_of_its_call(name: str, memory: str) -> None:
    module, engine = drawing(GLOBAL[name], memory)
    data, seen = torch.rand(3, 6), set()
    for _ in range(20):
        module.dropped.clear()
        run_batch(engine, loss_of(module), data, 3)
        (dropped,) = module.dropped
        before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        grads = engine.per_sample_gradients()["gain"]
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
        torch.testing.assert_close(grads, data * (1e5 if dropped else 1.0))
        seen.add(dropped)
    assert seen == {True, False}


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_draws_of_torchs_generator_are_refused(memory: str) -> None:
    """One draw for each sample cannot be told from one for all of them."""
    module, engine = drawing(lambda: float(torch.rand(())), memory)
    run_batch(engine, loss_of(module), torch.rand(3, 6), 3)
    with pytest.raises(PrivacyError, match=r"draw no random numbers.*'gain'.*microbatch_size=1"):
        engine.squared_norms([["gain"]])
