"""Gradients with few numbers share one norm and one sum; nothing is counted twice or lost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_dp.masks import ParameterMask
from lightning_dp.per_sample import PerSampleEngine, sources, stacking, uses
from lightning_dp.per_sample.stacking import Block, Joined, Part
from tests.per_sample import checks

NAN_ROW = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])


class Counted(TorchDispatchMode):
    """A mode that counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def network(depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4)) for _ in range(depth)))


def loss_of(module: nn.Module) -> Any:
    return lambda x: module(x).square().flatten(1).sum(1)


def run(depth: int, **options: Any) -> tuple[PerSampleEngine, list[str]]:
    module, data = network(depth), torch.randn(6, 3, 4)
    engine = checks.make_engine(module, loss_of(module), data, **options)
    checks.run_batch(engine, loss_of(module), data, 6)
    return engine, [name for name, _ in module.named_parameters()]


def counted(depth: int) -> Counter[str]:
    engine, names = run(depth)
    out = {name: torch.zeros_like(parameter) for name, parameter in engine._parameters.items()}
    with Counted() as mode:
        engine.squared_norms([names])
        engine.accumulate(torch.ones(1, 6), [names], out)
    engine.end()
    return mode.counts


def test_small_gradients_are_computed_together_at_any_depth() -> None:
    counts = counted(2)
    computed = {name: counts[name] for name in ("linalg_vector_norm", "bmm", "native_layer_norm", "mv", "mm", "addmm")}
    assert computed == {"linalg_vector_norm": 1, "bmm": 1, "native_layer_norm": 1, "mv": 1, "mm": 0, "addmm": 0}
    deep = counted(9)
    assert {name: deep[name] for name in computed} == computed


@pytest.mark.parametrize(
    "where", ["sources.FEW", "stacking.MOST_STACKED", "stacking.FEW", "uses.FEW", "uses.MOST_WAITING"]
)
def test_ways_of_small_gradients_agree(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, name = where.split(".")
    monkeypatch.setattr({"sources": sources, "stacking": stacking, "uses": uses}[home], name, 0)
    module, data = network(3).double(), torch.randn(6, 3, 4, dtype=torch.float64)
    checks.assert_engine_agrees(module, loss_of(module), data)


def test_long_inputs_of_one_layer_leave_the_others_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "MOST_STACKED", 500)
    first, others = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module, data = nn.ModuleList([first, others]), torch.randn(4, 200, 2)
    monkeypatch.setattr(stacking, "FEW", 1000)

    def loss(x: Tensor) -> Tensor:
        return others((first(x) + first(x.sin())).sum(1)).sum(1)

    engine = checks.make_engine(module, loss, data)
    checks.run_batch(engine, loss, data, 4)
    names = [name for name, _ in module.named_parameters()]
    engine.squared_norms([names])
    parts = [len(parts) for parts, _ in engine._parts._joined[tuple(names)]._shapes]
    assert sorted(parts) == [1, 1, 2, 2]
    engine.end()


def test_layers_of_other_settings_are_computed_apart() -> None:
    norms = [nn.LayerNorm(4, eps=eps) for eps in (1e-5, 0.1, 1e-5)]
    module = nn.Sequential(nn.Linear(4, 4), *norms, nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).double()
    data = torch.randn(6, 3, 4, dtype=torch.float64)
    checks.assert_engine_agrees(module, loss_of(module), data)


def test_joined_agrees_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = network(3).double(), torch.randn(6, 3, 4, dtype=torch.float64)
    for most in (0, 6 * 4, sources.MOST_JOINED):  # nothing, the vectors alone, everything
        monkeypatch.setattr(sources, "MOST_JOINED", most)
        checks.assert_engine_agrees(module, loss_of(module), data)


def test_lean_memory_stacks_no_more_than_the_backprops() -> None:
    engine, names = run(2, memory="lean")
    engine.squared_norms([names])
    kept = {key for source in engine._tracker.sources.values() for key in source.memory()}
    assert kept == {*names} - {"0.0.weight", "1.0.weight"}
    engine.end()


def test_few_inputs_and_backprops_wait_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are used within the backward, which frees them."""
    for few, made in ((uses.FEW, set()), (0, {"0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"})):
        monkeypatch.setattr(uses, "FEW", few)
        engine, _ = run(1)
        assert {key for source in engine._tracker.sources.values() for key in source._made} == made
        engine.end()


def joined_of(*parts: tuple[str, str, Any, Tensor]) -> Joined:
    return Joined([Block([Part(name, region, key)], grads.unsqueeze(0)) for name, key, region, grads in parts])


def test_joined_sum_drops_samples_of_factor_zero() -> None:
    joined = joined_of(("a", "a", None, NAN_ROW))
    out = {"a": torch.ones(2)}
    factors = torch.tensor([2.0, 0.0])
    assert joined.add_weighted_sum(factors, factors == 0, out, {}) == {("a", "a")}
    assert out["a"].tolist() == [3.0, 5.0]


def test_joined_sum_leaves_masked_parts_to_the_caller() -> None:
    grads = torch.ones(1, 2)
    joined = joined_of(("a", "a", None, grads), ("b", "b", None, grads))
    out = {"a": torch.zeros(1), "b": torch.zeros(2)}
    mask = ParameterMask(torch.tensor([True, False]))
    assert joined.add_weighted_sum(torch.ones(1), None, out, {"a": mask}) == {("b", "b")}
    assert out["a"].tolist() == [0.0]
    assert out["b"].tolist() == [1.0, 1.0]


def test_joined_sum_goes_to_the_region_of_a_view() -> None:
    grads: Tensor = torch.tensor([[1.0, 2.0]])
    region = (1, torch.Size([2]), (3,))  # second column of a 2 x 3 parameter
    out = {"a": torch.zeros(2, 3)}
    joined_of(("a", "column", region, grads)).add_weighted_sum(torch.ones(1), None, out, {})
    assert out["a"].tolist() == [[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]]
    apart = {"a": torch.zeros(3, 2).mT}  # a region counts elements of contiguous memory
    assert joined_of(("a", "column", region, grads)).add_weighted_sum(torch.ones(1), None, apart, {}) == set()
