"""What a mask of few live entries keeps of the gradients, made once for norms and sums."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from opacus.layers import DPLSTM
from torch import Tensor, nn

from lightning_dp.per_sample import sources
from lightning_dp.per_sample.rules import sparse_mask
from lightning_dp.per_sample.rules.base import Call, Rule
from lightning_dp.per_sample.rules.conv import ConvRule
from lightning_dp.per_sample.rules.linear import LinearRule
from lightning_dp.per_sample.rules.sparse_mask import places_of
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


#: module, data; none of these layers keeps whole gradients under memory="lean"
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


def few(expected: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: torch.rand(grad.shape[1:]) < share for name, grad in expected.items()}


def made(name: str, memory: str) -> tuple[nn.Module, Tensor, Any, dict[str, Tensor]]:
    make, shape = MODULES[name]
    module, data = make().double(), torch.randn(SIZE, *shape, dtype=torch.float64)
    loss = loss_of(module)
    expected = reference.per_sample_gradients(module, lambda i: loss(data[i : i + 1]).sum(), SIZE)
    return module, data, checks.make_engine(module, loss, data, memory=memory), expected


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.9])
@pytest.mark.parametrize("name", MODULES)
def test_norms_and_sums_are_those_of_batches_of_one(name: str, share: float, memory: str) -> None:
    module, data, engine, expected = made(name, memory)
    mask = few(expected, share)
    places = {one: places_of(tensor) for one, tensor in mask.items()}
    factors = torch.linspace(0.2, 1.0, SIZE, dtype=torch.float64)
    factors[1] = 0.0
    singles = [[one] for one in expected]
    for _ in range(2):
        checks.run_batch(engine, loss_of(module), data, SIZE)
        true = reference.squared_norms(expected, singles, mask)
        torch.testing.assert_close(engine.squared_norms(singles, mask), true)
        rows = {one: torch.ones(len(where), dtype=torch.float64) for one, where in places.items()}
        engine.accumulate(factors.repeat(len(singles), 1), singles, rows, mask, places)
        for one, grad in expected.items():
            total = torch.tensordot(factors, grad, dims=1)
            torch.testing.assert_close(rows[one] - 1, total[mask[one]])
        engine.end()


@pytest.mark.parametrize("name", ["linear", "conv2d", "recurrent"])
def test_what_the_norms_made_serves_the_sum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a second product; under another mask, or after another backprop, one is needed."""
    module, data, engine, expected = made(name, "lean")
    # biases are small: their gradients are kept whole
    weights = [one for one, grad in expected.items() if grad.dim() > 2]
    asked: list[str] = []
    for rule in (LinearRule, ConvRule):
        for method in ("add_weighted_sum", "live_entries", "masked_squared_norms"):
            own = getattr(rule, method)

            def spy(self: Rule, *args: Any, own: Any = own, method: str = method) -> Any:
                asked.append(method)
                return own(self, *args)

            monkeypatch.setattr(rule, method, spy)
    mask, other = few(expected, 0.1), few(expected, 0.1)
    ones, groups = torch.ones(1, SIZE, dtype=torch.float64), [weights]

    def add(under: dict[str, Tensor]) -> list[str]:
        asked.clear()
        where = {one: places_of(under[one]) for one in weights}
        rows = {one: torch.zeros(len(found), dtype=torch.float64) for one, found in where.items()}
        engine.accumulate(ones, groups, rows, under, where)
        for one in weights:
            torch.testing.assert_close(rows[one], expected[one].sum(0)[under[one]])
        return asked.copy()

    checks.run_batch(engine, loss_of(module), data, SIZE)
    asked.clear()
    engine.squared_norms(groups, mask)
    assert asked == ["live_entries"] * len(weights)
    assert add(mask) == []
    assert add(other) == ["add_weighted_sum"] * len(weights)
    engine.end()
    checks.run_batch(engine, loss_of(module), data, SIZE)
    assert add(mask) == ["add_weighted_sum"] * len(weights)
    engine.squared_norms(groups, mask)
    loss_of(module)(data[:SIZE]).sum().backward()  # the same once more: what was made is not all of it any more
    expected = {one: 2 * grad for one, grad in expected.items()}
    assert add(mask) == ["add_weighted_sum"] * len(weights)
    asked.clear()
    with monkeypatch.context() as patch:  # of many entries a product with the mask costs less
        patch.setattr(sources, "MOST_LIVE", 0.05)
        engine.squared_norms(groups, other)
    assert asked == ["masked_squared_norms"] * len(weights)
    engine.squared_norms(groups, mask)
    engine.discard(weights)
    assert not engine.has_backprops(weights)
    assert add({one: torch.zeros_like(mask[one]) for one in weights}) == []


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_a_sample_that_is_not_finite_is_dropped_whole(name: str) -> None:
    module, data, engine, expected = made(name, "lean")
    data[2, 0] = torch.nan
    mask = {one: torch.ones(grad.shape[1:], dtype=torch.bool) for one, grad in expected.items()}
    mask["weight"] = torch.zeros_like(mask["weight"])
    mask["weight"].view(-1)[[0, 3, 5]] = True
    checks.run_batch(engine, loss_of(module), data, SIZE)
    norms = engine.squared_norms([["weight"]], mask)[0]
    assert norms.isfinite().tolist() == [True, True, False, True]
    rows = {"weight": torch.zeros(3, dtype=torch.float64)}
    factors = torch.where(norms.isfinite(), 1.0, 0.0)[None]
    engine.accumulate(factors, [["weight"]], rows, mask, {"weight": places_of(mask["weight"])})
    kept = expected["weight"][[0, 1, 3]].flatten(1)[:, [0, 3, 5]]
    torch.testing.assert_close(rows["weight"], kept.sum(0))


@pytest.mark.parametrize(("memory", "room", "entries"), [("lean", 0, False), ("fast", 0, False), ("fast", 9e9, True)])
def test_they_are_kept_where_there_is_room(
    memory: str, room: float, entries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is smaller than the backprops always is; else it counts as kept gradients do."""
    module, data = nn.Linear(40, 30), torch.randn(SIZE, 2, 40)
    engine = checks.make_engine(module, loss_of(module), data, memory=memory)
    if engine._workspace is not None:
        engine._workspace._limit = lambda: room
    found = []
    own = LinearRule.live_entries
    monkeypatch.setattr(LinearRule, "live_entries", lambda *args: (found.append(args[5]), own(*args))[1])
    monkeypatch.setattr(LinearRule, "materialises", lambda *args: False)
    small, large = (torch.zeros(30, 40, dtype=torch.bool) for _ in range(2))
    small.view(-1)[: 2 * 30] = True  # as many as a sample has backprops
    large.view(-1)[: 2 * 30 + 1] = True
    for mask in (small, large):
        checks.run_batch(engine, loss_of(module), data, SIZE)
        engine.squared_norms([["weight"]], {"weight": mask})
    assert [len(places) for places in found] == [60, 61][: 1 + entries]


def test_no_gradient_of_all_samples_is_made() -> None:
    module, data = nn.Conv2d(64, 64, 3), torch.randn(256, 64, 5, 5)
    engine = checks.make_engine(module, loss_of(module), data, memory="lean")
    mask = {"weight": torch.rand(64, 64, 3, 3) < 0.01, "bias": torch.ones(64, dtype=torch.bool)}
    places = {name: places_of(tensor) for name, tensor in mask.items()}
    rows = {name: torch.zeros(len(found)) for name, found in places.items()}
    checks.run_batch(engine, loss_of(module), data, 256)
    with Largest() as seen:
        norms = engine.squared_norms([["weight"]], mask)[0]
        engine.accumulate(torch.ones(1, 256), [["weight", "bias"]], rows, mask, places)
    engine.detach()
    for sample in (0, 128, 255):  # of several blocks
        (grad,) = torch.autograd.grad(loss_of(module)(data[[sample]]).sum(), module.weight)
        torch.testing.assert_close(norms[sample], grad[mask["weight"]].square().sum(), rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(loss_of(module)(data).sum(), module.weight)
    torch.testing.assert_close(rows["weight"], grad[mask["weight"]], rtol=1e-3, atol=1e-2)
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
        places = torch.tensor([0, 2, 5])
        expected = Rule.live_entries(rule(), module, [call], SIZE, name, places)
        assert expected.shape == (SIZE, 3)
        torch.testing.assert_close(rule().live_entries(module, [call], SIZE, name, places), expected)
        nothing = Call((x[:0],), {}, x[:0], backprop[:0])
        assert rule().live_entries(module, [nothing], 0, name, places).shape == (0, 3)


def test_places_are_found_once_a_mask_and_anew_where_it_changed() -> None:
    gc.collect()
    before = len(sparse_mask._known_places)
    mask = torch.tensor([[True, False], [False, True]])
    found = places_of(mask)
    assert found.tolist() == [0, 3]
    assert places_of(mask) is found
    mask[0, 1] = True
    assert places_of(mask).tolist() == [0, 1, 3]
    assert len(sparse_mask._known_places) == before + 1
    del mask
    gc.collect()
    assert len(sparse_mask._known_places) == before
    with torch.inference_mode():
        assert places_of(torch.tensor([False, True])).tolist() == [1]
