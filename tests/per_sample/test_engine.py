"""Groups, masks, precision, memory: what the engine adds to its sources."""

from __future__ import annotations

import doctest
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_dp.per_sample.custom
import lightning_dp.per_sample.engine
import lightning_dp.per_sample.rules.base
import lightning_dp.per_sample.single
import lightning_dp.per_sample.tracking.nodes
from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine, SingleSampleEngine, make_engine, sources, stacking
from lightning_dp.per_sample import parts as parts_module
from lightning_dp.per_sample.precision import exact_arithmetic
from lightning_dp.per_sample.rules.base import Rule
from tests import reference
from tests.per_sample import checks
from tests.per_sample.checks import assert_engine_agrees, run_batch


def _loss(module: nn.Module):
    return lambda x: module(x).square().flatten(1).sum(1)


def _mixed() -> nn.Module:
    """One layer of every family that has a rule."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(2),
        nn.Linear(4, 5),
        nn.LayerNorm(5),
        nn.Tanh(),
        nn.RMSNorm(5, eps=1e-6),
        nn.Flatten(1),
        nn.Linear(20, 3),
    )


@pytest.mark.parametrize("options", [{}, {"memory": "lean"}, {"grad_sample": "materialize"}])
@pytest.mark.parametrize("size", [1, 6])
def test_engine_agrees_on_all_families(options: dict, size: int) -> None:
    module = _mixed().double()
    assert_engine_agrees(module, _loss(module), torch.randn(6, 2, 6, 6, dtype=torch.float64), size=size, **options)


def test_engine_in_float32_agrees_with_batches_of_one() -> None:
    module = _mixed()
    assert_engine_agrees(module, _loss(module), torch.randn(6, 2, 6, 6), rtol=2e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("grad_sample", ["auto", "materialize"])
def test_engine_under_bfloat16_keeps_norms_in_float32(grad_sample: str) -> None:
    """Norm and sum are of one gradient to float32 rounding, though backprops are bfloat16."""
    module = _mixed()
    data = torch.randn(6, 2, 6, 6)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x).float().square().flatten(1).sum(1)

    engine = checks.make_engine(module, loss, data, grad_sample=grad_sample)
    run_batch(engine, loss, data, 6)
    names = list(dict(module.named_parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = engine.squared_norms([[name] for name in names])
        assert norms.dtype == torch.float32
        for i in range(6):
            out = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
            engine.accumulate(torch.eye(6)[i].repeat(len(names), 1), [[name] for name in names], out)
            alone = torch.stack([out[name].square().sum() for name in names])
            torch.testing.assert_close(norms[:, i], alone, rtol=2e-4, atol=1e-6)


def test_groups_and_missing_parameters() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    module = Two().double()
    data = torch.randn(6, 3, dtype=torch.float64)
    expected = reference.per_sample_gradients(module, lambda i: _loss(module)(data[i : i + 1]).sum(), 6)
    engine = checks.make_engine(module, _loss(module), data)
    run_batch(engine, _loss(module), data, 6)
    groups = [["used.weight", "unused.bias"], ["used.bias"], [], ["unused.weight"]]
    norms = engine.squared_norms(groups)
    torch.testing.assert_close(norms, reference.squared_norms(expected, groups))
    assert engine.squared_norms([]).shape == (0, 6)
    out = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    engine.accumulate(torch.ones(4, 6, dtype=torch.float64), groups, out)
    torch.testing.assert_close(out["used.weight"], expected["used.weight"].sum(0))
    assert not out["unused.weight"].any()
    assert set(engine.per_sample_gradients(["used.bias"])) == {"used.bias"}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("grad_sample", ["auto", "materialize"])
def test_a_sample_that_is_not_finite_contributes_exactly_zero(bad: float, grad_sample: str) -> None:
    module = _mixed()
    data = torch.randn(6, 2, 6, 6)
    spoiled = data.clone()
    spoiled[2] = bad
    spoiled[4, 0, 0, 0] = bad
    engine = checks.make_engine(module, _loss(module), data, grad_sample=grad_sample)
    names = list(dict(module.named_parameters()))
    sums = []
    for batch in (spoiled, data):
        run_batch(engine, _loss(module), batch, 6)
        norms = engine.squared_norms([names])
        if batch is data:
            factors = torch.where(torch.tensor([True, True, False, True, False, True]), 0.5, 0.0)[None]
        else:
            factors = torch.where(norms.isfinite(), 0.5, 0.0)
            factors[:, [2, 4]] = 0
            assert norms[0, [0, 1, 3, 5]].isfinite().all()
        out = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        engine.accumulate(factors, [names], out)
        sums.append(out)
    for name in names:
        torch.testing.assert_close(sums[0][name], sums[1][name], rtol=1e-6, atol=1e-6)


def test_a_mean_loss_gives_gradients_divided_by_the_batch() -> None:
    module = nn.Linear(3, 2).double()
    data = torch.randn(6, 3, dtype=torch.float64)
    expected = reference.per_sample_gradients(module, lambda i: _loss(module)(data[i : i + 1]).sum(), 6)
    engine = checks.make_engine(module, lambda x: _loss(module)(x).mean(), data)
    run_batch(engine, lambda x: _loss(module)(x).mean(), data, 6)
    torch.testing.assert_close(engine.per_sample_gradients()["weight"] * 6, expected["weight"])


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_small_gradients_are_made_once(monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    calls = []
    from lightning_dp.per_sample.rules.norm import LayerNormRule

    true = LayerNormRule.per_sample
    monkeypatch.setattr(LayerNormRule, "per_sample", lambda *args: calls.append(1) or true(*args))
    module = nn.LayerNorm(3)
    engine = checks.make_engine(module, _loss(module), torch.randn(6, 3), memory=memory)
    calls.clear()
    run_batch(engine, _loss(module), torch.randn(6, 3), 6)
    engine.squared_norms([["weight", "bias"]])
    out = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    engine.accumulate(torch.ones(1, 6), [["weight", "bias"]], out)
    assert len(calls) == 1


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_gradients_of_functions_of_parameters_are_computed_once(monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    """Norms and sums come from the same tensor, also where little memory is used: they may not differ by rounding."""
    calls = []
    own = parts_module.pulled_back
    monkeypatch.setattr(parts_module, "pulled_back", lambda *args: calls.append(1) or own(*args))
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    engine = checks.make_engine(module, _loss(module), torch.randn(6, 3), memory=memory)
    run_batch(engine, _loss(module), torch.randn(6, 3), 6)
    names = [name for name, _ in module.named_parameters()]
    engine.squared_norms([names])
    engine.accumulate(torch.ones(1, 6), [names], {name: torch.zeros_like(p) for name, p in module.named_parameters()})
    assert len(calls) == 1


def test_functions_of_parameters_end_with_the_microbatch() -> None:
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    engine = checks.make_engine(module, _loss(module), torch.randn(6, 3))
    ended: list[weakref.ref[Any]] = []
    for _ in range(3):
        run_batch(engine, _loss(module), torch.randn(6, 3), 6)
        engine.squared_norms([[name for name, _ in module.named_parameters()]])
        ended += [weakref.ref(source) for source in engine._tracker.sources.values() if not source.is_lasting]
        engine.end()
    gc.collect()
    assert len(ended) == 3
    assert not any(ref() for ref in ended)


def test_full_precision_inside_and_the_users_setting_outside() -> None:
    seen = []
    before = torch.get_float32_matmul_precision()
    for setting in ("medium", "high", "highest"):
        try:
            torch.set_float32_matmul_precision(setting)
            given = torch.backends.mkldnn.matmul.fp32_precision
            with exact_arithmetic("cpu"):
                seen.append((torch.backends.mkldnn.matmul.fp32_precision, torch.is_grad_enabled()))
            assert torch.backends.mkldnn.matmul.fp32_precision == given
            assert torch.get_float32_matmul_precision() == setting
        finally:
            torch.set_float32_matmul_precision(before)
    assert seen == [("ieee", False)] * 3


def test_rules_run_in_exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_dp.per_sample.rules.linear import LinearRule

    seen = []
    true = LinearRule.add_weighted_sum

    def add_weighted_sum(self: Rule, *args):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return true(self, *args)

    monkeypatch.setattr(sources, "FEW", 0)
    monkeypatch.setattr(stacking, "FEW", 0)
    monkeypatch.setattr(LinearRule, "add_weighted_sum", add_weighted_sum)
    module = nn.Linear(3, 2)
    engine = checks.make_engine(module, _loss(module), torch.randn(6, 3))
    run_batch(engine, _loss(module), torch.randn(6, 3), 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.accumulate(torch.ones(1, 6), [["weight"]], {"weight": torch.zeros(2, 3)})
    assert seen == [(False, False)]


@pytest.mark.parametrize("options", [{"grad_sample": "ghost"}, {"memory": "small"}])
def test_engine_refuses_unknown_settings(options: dict) -> None:
    with pytest.raises(ValueError, match=f"got {next(iter(options))}="):
        PerSampleEngine(nn.Linear(1, 1), **options)


@pytest.mark.parametrize("size", [-1, float("nan")])
def test_begin_refuses_sizes_that_are_none(size: float) -> None:
    with pytest.raises(ValueError, match="batch_size >= 0"):
        PerSampleEngine(nn.Linear(1, 1)).begin(size)


def test_begin_needs_a_layout() -> None:
    engine = PerSampleEngine(nn.Linear(1, 1))
    engine.set_parameters(dict(engine._module.named_parameters()))
    with pytest.raises(PrivacyError, match="learn_layout before begin"):
        engine.begin(2)


def test_make_engine_picks_plain_autograd_for_single_samples() -> None:
    options = {"grad_sample": "auto", "memory": "fast"}
    assert isinstance(make_engine(nn.Linear(1, 1), alone=True, **options), SingleSampleEngine)
    assert isinstance(make_engine(nn.Linear(1, 1), alone=False, **options), PerSampleEngine)


@pytest.mark.parametrize(
    "module",
    [
        lightning_dp.per_sample.engine,
        lightning_dp.per_sample.single,
        lightning_dp.per_sample.custom,
        lightning_dp.per_sample.tracking.nodes,
        lightning_dp.per_sample.rules.base,
    ],
)
def test_examples_run(module) -> None:
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
