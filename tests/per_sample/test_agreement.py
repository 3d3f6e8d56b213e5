"""Every way to the same numbers: kept, lean and materialised, whole batches and microbatches, tied layers, drawn
networks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_dp.per_sample import PerSampleEngine, engine
from tests import reference
from tests.per_sample import checks

WAYS: list[dict[str, Any]] = [{}, {"memory": "lean"}, {"grad_sample": "materialize"}]


class Drawn(nn.Module):
    """Tokens, a convolution over them, a linear layer at every position, and one that is used twice."""

    def __init__(self, *, width: int, kernel: int, stride: int, dilation: int, groups: int, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(6, width)
        self.conv = nn.Conv1d(width, width, kernel, stride, kernel, dilation, groups)
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, 6)
        self.tied = tied
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv(self.tokens(x).mT).mT)
        hidden = self.inner(torch.tanh(hidden))
        return self.head(self.inner(hidden) if self.tied else hidden)


def losses(module: nn.Module) -> checks.Loss:
    return lambda x: module(x).square().flatten(1).sum(1)


drawn_networks = st.fixed_dictionaries(
    {
        "width": st.sampled_from([2, 4]),
        "kernel": st.integers(1, 3),
        "stride": st.integers(1, 2),
        "dilation": st.integers(1, 2),
        "groups": st.integers(1, 2),
        "tied": st.booleans(),
    }
)


@given(options=drawn_networks, way=st.sampled_from(WAYS), size=st.sampled_from([0, 1, 3]), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_drawn_networks_agree_with_batches_of_one(options: Any, way: dict, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = Drawn(**options).double()
    checks.assert_engine_agrees(module, losses(module), torch.randint(6, (4, 5)), size=size, **way)


def norms_and_sums(made: PerSampleEngine, module: nn.Module, data: Tensor, split: list[int]) -> tuple[Tensor, Tensor]:
    """Norms of all samples and their clipped sum, taken microbatch by microbatch."""
    names = list(made._parameters)
    out = {name: torch.zeros_like(parameter) for name, parameter in made._parameters.items()}
    norms = []
    for part in data.split(split):
        checks.run_batch(made, losses(module), part, len(part))
        squares = made.squared_norms([names])
        made.accumulate((1 / squares.sqrt()).clamp(max=1.0), [names], out)
        made.end()
        norms.append(squares)
    return torch.cat(norms, 1), torch.cat([total.flatten() for total in out.values()])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("split", [[6], [4, 2], [1, 5], [1] * 6])
def test_ways_and_microbatches_give_the_same_clipped_sum(split: list[int], tied: bool) -> None:
    """In float32, as it is used: never further apart than rounding, and never beyond the clipping norm."""
    torch.manual_seed(0)
    module = Drawn(width=4, kernel=3, stride=1, dilation=1, groups=1, tied=tied)
    data = torch.randint(6, (6, 40))
    exact = reference.per_sample_gradients(module, lambda i: losses(module)(data[i : i + 1]).sum(), 6)
    squares = reference.squared_norms(exact, [list(exact)])
    factors = (1 / squares[0].sqrt()).clamp(max=1.0)
    total = torch.cat([grad.flatten() for grad in reference.weighted_sum(exact, factors).values()])
    for way in WAYS:
        made = checks.make_engine(module, losses(module), data, **way)
        norms, sums = norms_and_sums(made, module, data, split)
        torch.testing.assert_close(norms, squares, rtol=1e-4, atol=0)
        torch.testing.assert_close(sums, total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("share", [0.0, 100.0])
def test_a_row_that_is_not_finite_reaches_no_other_sample(
    monkeypatch: pytest.MonkeyPatch, way: dict, share: float
) -> None:
    monkeypatch.setattr(engine, "SHARE", share)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(2), nn.Linear(70, 3))
    data = torch.randn(5, 2, 72)
    made = checks.make_engine(module, losses(module), data, **way)
    names = [name for name, _ in module.named_parameters()]
    masks = checks.parameter_masks({name: torch.rand_like(p) < 0.5 for name, p in module.named_parameters()})
    data[3, 1, 7] = torch.nan
    checks.run_batch(made, losses(module), data, 5)
    for mask in (None, masks):
        norms = made.squared_norms([names], mask)
        assert norms.isfinite()[0].tolist() == [True, True, True, False, True]
    out = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    made.accumulate(torch.where(norms.isfinite(), 1.0, 0.0), [names], out)
    made.end()
    clean = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    checks.run_batch(made, losses(module), data[[0, 1, 2, 4]], 4)
    made.accumulate(torch.ones(1, 4), [names], clean)
    for name in names:
        torch.testing.assert_close(out[name], clean[name], rtol=1e-4, atol=1e-4)
