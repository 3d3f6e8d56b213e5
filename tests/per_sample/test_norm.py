"""Normalisation rules against a loop over batches of one, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.per_sample.rules.base import Call, Rule
from lightning_dp.per_sample.rules.norm import GroupNormRule, InstanceNormRule, LayerNormRule, RMSNormRule
from tests import reference
from tests.cases import each
from tests.per_sample.checks import weighted_sum

F64 = torch.float64
CASES = [
    (LayerNormRule(), nn.LayerNorm(5, dtype=F64), (5,)),
    (LayerNormRule(), nn.LayerNorm(5, dtype=F64), (3, 4, 5)),
    (LayerNormRule(), nn.LayerNorm((4, 5), eps=0.1, dtype=F64), (3, 4, 5)),
    (LayerNormRule(), nn.LayerNorm((3, 4, 5), bias=False, dtype=F64), (3, 4, 5)),
    (RMSNormRule(), nn.RMSNorm(5, dtype=F64), (3, 5)),
    (RMSNormRule(), nn.RMSNorm((4, 5), eps=0.1, dtype=F64), (3, 4, 5)),
    (GroupNormRule(), nn.GroupNorm(2, 6, dtype=F64), (6,)),
    (GroupNormRule(), nn.GroupNorm(3, 6, eps=0.1, dtype=F64), (6, 4, 3)),
    (GroupNormRule(), nn.GroupNorm(1, 6, dtype=F64), (6, 2, 3, 2)),
    (InstanceNormRule(), nn.InstanceNorm1d(4, affine=True, dtype=F64), (4, 6)),
    (InstanceNormRule(), nn.InstanceNorm2d(4, affine=True, eps=0.1, dtype=F64), (4, 3, 5)),
    (InstanceNormRule(), nn.InstanceNorm3d(4, affine=True, dtype=F64), (4, 3, 2, 2)),
]
IDS = [f"{type(layer).__name__}-{i}" for i, (_, layer, _) in enumerate(CASES)]


def made_calls(layer: nn.Module, shape: tuple[int, ...], batch_size: int, multiplicity: int, calls: int) -> list[Call]:
    made = []
    for _ in range(calls):
        x = 1 + 2 * torch.randn(batch_size * multiplicity, *shape, dtype=F64)
        made.append(Call(inputs=(x,), kwargs={}, activation=x, backprop=torch.randn_like(x), multiplicity=multiplicity))
    return made


def looped(layer: nn.Module, calls: list[Call], batch_size: int) -> dict[str, Tensor]:
    def loss_of(i: int) -> Tensor:
        total = torch.zeros((), dtype=F64)
        for call in calls:
            rows = slice(i * call.multiplicity, (i + 1) * call.multiplicity)
            total = total + (layer(call.activation[rows]) * call.backprop[rows]).sum()
        return total

    return reference.per_sample_gradients(layer, loss_of, batch_size)


@each("rule, layer, shape", CASES)
@each("batch_size, multiplicity, calls", [(1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 1, 2)])
def test_norm_matches_loop(
    rule: Rule, layer: nn.Module, shape: tuple[int, ...], batch_size: int, multiplicity: int, calls: int
) -> None:
    nn.init.normal_(layer.weight)
    names = {name for name, _ in layer.named_parameters()}
    made = made_calls(layer, shape, batch_size, multiplicity, calls)
    expected = looped(layer, made, batch_size)
    factors = torch.linspace(-1, 2, batch_size, dtype=F64)
    with torch.no_grad():
        grads = rule.per_sample(layer, made, batch_size, names)
        norms = rule.squared_norms(layer, made, batch_size, names)
        sums = weighted_sum(rule, layer, made, factors, batch_size, names)
    assert set(grads) == set(norms) == set(sums) == names
    for name in names:
        torch.testing.assert_close(grads[name], expected[name])
        torch.testing.assert_close(norms[name], reference.squared_norms(expected, [[name]])[0])
        torch.testing.assert_close(sums[name], reference.weighted_sum(expected, factors)[name])


@each("rule, layer, shape", CASES)
def test_norm_of_an_empty_batch_is_empty(rule: Rule, layer: nn.Module, shape: tuple[int, ...]) -> None:
    calls = made_calls(layer, shape, 0, 1, 1)
    grads = rule.per_sample(layer, calls, 0, {"weight"})
    assert list(grads) == ["weight"]
    assert grads["weight"].shape == (0, *layer.weight.shape)
    assert rule.squared_norms(layer, calls, 0, {"weight"})["weight"].shape == (0,)
    sums = weighted_sum(rule, layer, calls, torch.empty(0, dtype=F64), 0, {"weight"})
    torch.testing.assert_close(sums["weight"], torch.zeros_like(layer.weight.detach()))


@each("rule, layer, shape", CASES)
@each("where", ["activation", "backprop"])
def test_norm_keeps_a_non_finite_sample_to_itself(
    rule: Rule, layer: nn.Module, shape: tuple[int, ...], where: str
) -> None:
    calls = made_calls(layer, shape, 3, 1, 1)
    expected = looped(layer, calls, 3)["weight"]
    getattr(calls[0], where)[1].view(-1)[0] = float("nan")
    norms = rule.squared_norms(layer, calls, 3, {"weight"})["weight"]
    assert norms.isnan().tolist() == [False, True, False]
    factors = torch.tensor([0.5, 0.0, 2.0], dtype=F64)
    got = weighted_sum(rule, layer, calls, factors, 3, {"weight"})["weight"]
    torch.testing.assert_close(got, 0.5 * expected[0] + 2 * expected[2])


def test_instance_norm_keeps_running_statistics_in_eval() -> None:
    layer = nn.InstanceNorm1d(4, affine=True, track_running_stats=True, dtype=F64)
    layer(3 + torch.randn(8, 4, 6, dtype=F64))
    layer.eval()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    calls = made_calls(layer, (4, 6), 3, 1, 1)
    expected = looped(layer, calls, 3)
    got = InstanceNormRule().per_sample(layer, calls, 3, {"weight", "bias"})
    for name, grads in expected.items():
        torch.testing.assert_close(got[name], grads)
    layer.train()
    InstanceNormRule().per_sample(layer, calls, 3, {"weight"})
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm_uses_the_eps_of_the_layer(dtype: torch.dtype, eps: float | None) -> None:
    # the input's scale is chosen so that the epsilon of any type decides over the result
    layer = nn.RMSNorm(4, eps=eps, dtype=dtype)
    for scale in (1e-2, 1e-4, 1e-8):
        x = torch.full((2, 4), scale, dtype=dtype)
        call = Call((x,), {}, x, torch.ones_like(x), 1)
        got = RMSNormRule().per_sample(layer, [call], 2, {"weight"})["weight"]
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got, layer(x).detach().to(got.dtype), rtol=1e-2, atol=0)


@each("rule, layer, shape", CASES)
def test_norm_accumulates_bfloat16_in_float32(rule: Rule, layer: nn.Module, shape: tuple[int, ...]) -> None:
    names = {name for name, _ in layer.named_parameters()}
    call = made_calls(layer, shape, 3, 2, 1)[0]
    rounded = Call((), {}, call.activation.bfloat16(), call.backprop.bfloat16(), 2)
    exact = Call((), {}, rounded.activation.double(), rounded.backprop.double(), 2)
    got = rule.per_sample(layer, [rounded], 3, names)
    expected = rule.per_sample(layer, [exact], 3, names)
    # without an eps of its own RMSNorm normalises in the type of its input
    loose = 2e-2 if layer.eps is None else 1e-4
    for name in names:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), expected[name], rtol=loose, atol=loose)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_group_norm_reads_memory_in_any_order(batch_size: int) -> None:
    """Channels last, as after a transposition: torch's kernel takes every memory for contiguous."""
    layer = nn.GroupNorm(1, 3, dtype=F64)
    nn.init.normal_(layer.weight)
    x, backprop = (torch.randn(batch_size, 4, 3, dtype=F64).transpose(1, 2) for _ in range(2))
    call = Call(inputs=(x,), kwargs={}, activation=x, backprop=backprop)
    made = GroupNormRule().per_sample(layer, [call], batch_size, {"weight", "bias"})
    for name, expected in looped(layer, [call], batch_size).items():
        torch.testing.assert_close(made[name], expected, rtol=1e-12, atol=1e-12)
