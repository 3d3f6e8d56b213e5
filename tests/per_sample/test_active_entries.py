"""Active entries of the gradients under masks with few of them: computed once for norms and sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opacus.layers import DPLSTM
from torch import Tensor, nn

from lightning_dp.masks import ParameterMask
from lightning_dp.per_sample import sources, stacking
from lightning_dp.per_sample.rules.base import Call, Rule
from lightning_dp.per_sample.rules.conv import ConvRule
from lightning_dp.per_sample.rules.linear import LinearRule
from tests import reference
from tests.helpers import Largest
from tests.per_sample import checks

SIZE = 4


class Recurrent(nn.Module):
    """Its layers are called once a time step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = DPLSTM(7, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


#: module, data; none of these layers caches whole gradients under memory="lean"
MODULES: dict[str, Any] = {
    "linear": (lambda: nn.Linear(17, 19), (5, 17)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), (4, 6, 5)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2, dilation=2, padding="same"), (4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 3, 4, 3)),
    "recurrent": (Recurrent, (3, 7)),
}


def loss_of(module: nn.Module) -> checks.Loss:
    return lambda x: module(x).square().flatten(1).sum(1)


def few(expected: dict[str, Tensor], share: float) -> dict[str, ParameterMask]:
    return checks.parameter_masks({name: torch.rand(grad.shape[1:]) < share for name, grad in expected.items()})


def made(name: str, memory: str) -> tuple[nn.Module, Tensor, Any, dict[str, Tensor]]:
    make, shape = MODULES[name]
    module, data = make().double(), torch.randn(SIZE, *shape, dtype=torch.float64)
    loss = loss_of(module)
    expected = reference.per_sample_gradients(module, lambda i: loss(data[i : i + 1]).sum(), SIZE)
    return module, data, checks.make_engine(module, loss, data, memory=memory), expected


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.9])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.one_in(3)
def test_norms_and_sums_are_those_of_batches_of_one(name: str, share: float, memory: str) -> None:
    module, data, engine, expected = made(name, memory)
    masks = few(expected, share)
    active = {one: mask.active for one, mask in masks.items()}
    factors = torch.linspace(0.2, 1.0, SIZE, dtype=torch.float64)
    factors[1] = 0.0
    singles = [[one] for one in expected]
    for _ in range(2):
        checks.run_batch(engine, loss_of(module), data, SIZE)
        true = reference.squared_norms(expected, singles, active)
        torch.testing.assert_close(engine.squared_norms(singles, masks), true)
        rows = checks.rows_for(masks, torch.float64)
        engine.accumulate(factors.repeat(len(singles), 1), singles, rows, masks)
        for one, grad in expected.items():
            total = torch.tensordot(factors, grad, dims=1)
            torch.testing.assert_close(rows[one], total[active[one]])
        engine.end()


@pytest.mark.parametrize("name", ["linear", "conv2d", "recurrent"])
def test_entries_of_the_norms_serve_the_sum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a second product; under another mask, or after another backprop, one is needed."""
    module, data, engine, expected = made(name, "lean")
    # biases are small: their gradients are cached whole
    weights = [one for one, grad in expected.items() if grad.dim() > 2]
    asked: list[str] = []
    for rule in (LinearRule, ConvRule):
        for method in ("add_weighted_sum", "active_entries", "masked_squared_norms"):
            own = getattr(rule, method)

            def spy(self: Rule, *args: Any, own: Any = own, method: str = method) -> Any:
                asked.append(method)
                return own(self, *args)

            monkeypatch.setattr(rule, method, spy)
    mask, other = few(expected, 0.1), few(expected, 0.1)
    ones, groups = torch.ones(1, SIZE, dtype=torch.float64), [weights]

    def add(under: dict[str, ParameterMask]) -> list[str]:
        asked.clear()
        rows = checks.rows_for(under, torch.float64)
        engine.accumulate(ones, groups, rows, under)
        for one in weights:
            torch.testing.assert_close(rows[one], under[one].select(expected[one].sum(0)))
        return asked.copy()

    checks.run_batch(engine, loss_of(module), data, SIZE)
    asked.clear()
    engine.squared_norms(groups, mask)
    assert asked == ["active_entries"] * len(weights)
    assert add(mask) == []
    assert add(other) == ["add_weighted_sum"] * len(weights)
    engine.end()
    checks.run_batch(engine, loss_of(module), data, SIZE)
    assert add(mask) == ["add_weighted_sum"] * len(weights)
    engine.squared_norms(groups, mask)
    loss_of(module)(data[:SIZE]).sum().backward()  # the same once more: what is cached is not all of it any more
    expected = {one: 2 * grad for one, grad in expected.items()}
    assert add(mask) == ["add_weighted_sum"] * len(weights)
    asked.clear()
    with monkeypatch.context() as patch:  # of many entries a product with the mask costs less
        patch.setattr(sources, "MOST_ACTIVE", 0.05)
        engine.squared_norms(groups, other)
    assert asked == ["masked_squared_norms"] * len(weights)
    engine.squared_norms(groups, mask)
    engine.discard(weights)
    assert not engine.has_backprops(weights)
    expected = {one: 0 * grad for one, grad in expected.items()}
    assert add(mask) == []


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_a_sample_that_is_not_finite_is_dropped_whole(name: str) -> None:
    module, data, engine, expected = made(name, "lean")
    data[2, 0] = torch.nan
    active = torch.zeros(expected["weight"].shape[1:], dtype=torch.bool)
    active.view(-1)[[0, 3, 5]] = True
    masks = checks.parameter_masks({"weight": active})
    checks.run_batch(engine, loss_of(module), data, SIZE)
    norms = engine.squared_norms([["weight"]], masks)[0]
    assert norms.isfinite().tolist() == [True, True, False, True]
    rows = checks.rows_for(masks, torch.float64)
    factors = torch.where(norms.isfinite(), 1.0, 0.0)[None]
    engine.accumulate(factors, [["weight"]], rows, masks)
    kept = expected["weight"][[0, 1, 3]].flatten(1)[:, [0, 3, 5]]
    torch.testing.assert_close(rows["weight"], kept.sum(0))


@pytest.mark.parametrize(("memory", "limit", "entries"), [("lean", 0, False), ("fast", 0, False), ("fast", 9e9, True)])
def test_entries_are_cached_if_memory_allows(
    memory: str, limit: float, entries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries smaller than the backprops always are; others count as cached gradients do."""
    module, data = nn.Linear(40, 30), torch.randn(SIZE, 2, 40)
    engine = checks.make_engine(module, loss_of(module), data, memory=memory)
    if engine._workspace is not None:
        engine._workspace._limit = lambda: limit
    found = []
    monkeypatch.setattr(sources, "FEW", 0)
    monkeypatch.setattr(stacking, "FEW", 0)
    own = LinearRule.active_entries
    monkeypatch.setattr(LinearRule, "active_entries", lambda *args: (found.append(args[5]), own(*args))[1])
    monkeypatch.setattr(LinearRule, "materialises", lambda *args: False)
    small, large = (torch.zeros(30, 40, dtype=torch.bool) for _ in range(2))
    small.view(-1)[: 2 * 30] = True  # as many as a sample has backprops
    large.view(-1)[: 2 * 30 + 1] = True
    for mask in (small, large):
        checks.run_batch(engine, loss_of(module), data, SIZE)
        engine.squared_norms([["weight"]], {"weight": ParameterMask(mask)})
    assert [mask.num_active for mask in found] == [60, 61][: 1 + entries]


def test_no_gradient_of_all_samples_is_made() -> None:
    module, data = nn.Conv2d(64, 64, 3), torch.randn(256, 64, 5, 5)
    engine = checks.make_engine(module, loss_of(module), data, memory="lean")
    active = torch.rand(64, 64, 3, 3) < 0.01
    masks = checks.parameter_masks({"weight": active})
    rows = {**checks.rows_for(masks), "bias": torch.zeros(64)}
    checks.run_batch(engine, loss_of(module), data, 256)
    with Largest() as seen:
        norms = engine.squared_norms([["weight"]], masks)[0]
        engine.accumulate(torch.ones(1, 256), [["weight", "bias"]], rows, masks)
    engine.detach()
    for sample in (0, 128, 255):  # of several blocks
        (grad,) = torch.autograd.grad(loss_of(module)(data[[sample]]).sum(), module.weight)
        torch.testing.assert_close(norms[sample], grad[active].square().sum(), rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(loss_of(module)(data).sum(), module.weight)
    torch.testing.assert_close(rows["weight"], grad[active], rtol=1e-3, atol=1e-2)
    assert 0 < seen.elements < 256 * module.weight.numel() / 2


@pytest.mark.parametrize("rule", [LinearRule, ConvRule])
def test_the_general_way_gives_the_same_entries(rule: type[Rule]) -> None:
    """Also of a bias, which no engine asks for."""
    if rule is ConvRule:
        module: nn.Module = nn.Conv1d(4, 6, 3)
        x = torch.randn(SIZE, 4, 7)
        backprop = torch.randn(SIZE, 6, 5)
    else:
        module, x, backprop = nn.Linear(4, 6), torch.randn(SIZE, 3, 4), torch.randn(SIZE, 3, 6)
    call = Call((x,), {}, x, backprop)
    for name in ("weight", "bias"):
        active = torch.zeros(module.get_parameter(name).shape, dtype=torch.bool)
        active.view(-1)[[0, 2, 5]] = True
        mask = ParameterMask(active)
        expected = Rule.active_entries(rule(), module, [call], SIZE, name, mask)
        assert expected.shape == (SIZE, 3)
        torch.testing.assert_close(rule().active_entries(module, [call], SIZE, name, mask), expected)
        nothing = Call((x[:0],), {}, x[:0], backprop[:0])
        assert rule().active_entries(module, [nothing], 0, name, mask).shape == (0, 3)
