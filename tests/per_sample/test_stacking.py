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
from lightning_dp.per_sample import PerSampleEngine, combining, sources, stacking
from lightning_dp.per_sample.stacking import Joined, Part
from lightning_dp.per_sample.targets import Targets, places_of
from lightning_dp.per_sample.tracking import uses
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
    views, _ = engine._parts._sorted({*names}, {})
    assert [len(together) for together, _ in stacking.stacks_of(views, {}, lean=False)] == [1, 2]
    engine.end()


def test_layers_of_other_settings_are_computed_apart() -> None:
    norms = [nn.LayerNorm(4, eps=eps) for eps in (1e-5, 0.1, 1e-5)]
    module = nn.Sequential(nn.Linear(4, 4), *norms, nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).double()
    data = torch.randn(6, 3, 4, dtype=torch.float64)
    checks.assert_engine_agrees(module, loss_of(module), data)


def test_joined_agrees_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = network(3).double(), torch.randn(6, 3, 4, dtype=torch.float64)
    for most in (0, 6 * 4, combining.MOST_JOINED):  # nothing, the vectors alone, everything
        monkeypatch.setattr(combining, "MOST_JOINED", most)
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
    ranked = enumerate(parts)
    return Joined([(Part(name, region, key, (rank, 0)), grads) for rank, (name, key, region, grads) in ranked])


def test_joined_sum_drops_samples_of_factor_zero() -> None:
    joined = joined_of(("a", "a", None, NAN_ROW))
    out = {"a": torch.ones(2)}
    factors = torch.tensor([2.0, 0.0])
    assert joined.add_weighted_sum(factors, factors == 0, out, {}) == {"a"}
    assert out["a"].tolist() == [3.0, 5.0]


def test_joined_sum_leaves_masked_parts_to_the_caller() -> None:
    grads = torch.ones(1, 2)
    joined = joined_of(("a", "a", None, grads), ("b", "b", None, grads))
    out = {"a": torch.zeros(1), "b": torch.zeros(2)}
    mask = ParameterMask(torch.tensor([True, False]))
    assert joined.add_weighted_sum(torch.ones(1), None, out, {"a": mask}) == {"b"}
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


def test_joined_sum_of_neighbours_goes_to_the_buffer_at_once() -> None:
    """Whole parameters, and regions that are rows of numbers, in the order of the buffer; others by themselves."""
    shapes = {name: torch.Size(shape) for name, shape in (("a", (2,)), ("left", (1,)), ("b", (2, 2)), ("c", (2,)))}
    places, expected = places_of(shapes), torch.tensor([1.0, 2.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    for rows, strides in ((True, (1,)), (False, (2,))):
        regions = [(number if not rows else 2 * number, torch.Size([2]), strides) for number in range(2)]
        seen = [[3.0, 4.0], [5.0, 6.0]] if rows else [[3.0, 5.0], [4.0, 6.0]]
        halves = [("b", f"b{i}", regions[i], torch.tensor([seen[i]])) for i in range(2)]
        whole = [(name, name, None, torch.tensor([values])) for name, values in (("a", [1.0, 2.0]), ("c", [7.0, 8.0]))]
        joined = joined_of(whole[0], *halves, whole[1])
        with Counted() as mode:
            out = Targets(torch.zeros(9), places)
            done = joined.add_weighted_sum(torch.ones(1), None, out, {})
        assert done == {"a", "b0", "b1", "c"}
        assert torch.equal(out.flat, expected)
        assert mode.counts["as_strided"] == (0 if rows else 2)
