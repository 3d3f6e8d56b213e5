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
from lightning_dp.per_sample import PerSampleEngine, sources
from lightning_dp.per_sample.combining import Joined
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


@pytest.mark.parametrize("depth", [1, 5])
def test_few_numbers_share_norm_and_sum_at_any_depth(depth: int) -> None:
    engine, names = run(depth)
    out = {name: torch.zeros_like(parameter) for name, parameter in engine._parameters.items()}
    with Counted() as mode:
        engine.squared_norms([names])
        engine.accumulate(torch.ones(1, 6), [names], out)
    computed = {name: mode.counts[name] for name in ("linalg_vector_norm", "cat", "mm", "addmm", "bmm", "addmv_")}
    assert computed == {"linalg_vector_norm": 1, "cat": 1, "mm": 1, "addmm": 0, "bmm": 0, "addmv_": 0}
    engine.end()


def test_joined_agrees_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = network(3).double(), torch.randn(6, 3, 4, dtype=torch.float64)
    for most in (0, 6 * 4, sources.MOST_JOINED):  # nothing, the vectors alone, everything
        monkeypatch.setattr(sources, "MOST_JOINED", most)
        checks.assert_engine_agrees(module, loss_of(module), data)


def test_lean_memory_caches_no_further_gradients() -> None:
    engine, _ = run(1, memory="lean")
    cached = {key for source in engine._tracker.sources.values() for key in source._made}
    assert cached == {"0.2.weight", "0.2.bias"}
    engine.end()


def test_few_numbers_are_cached_in_place_of_products() -> None:
    engine, names = run(1)
    assert {key for source in engine._tracker.sources.values() for key in source._made} == set(names)
    engine.end()


def test_joined_sum_drops_samples_of_factor_zero() -> None:
    joined = Joined([("a", "a", None, NAN_ROW)])
    out = {"a": torch.ones(2)}
    factors = torch.tensor([2.0, 0.0])
    assert joined.add_weighted_sum(factors, factors == 0, out, {}) == {("a", "a")}
    assert out["a"].tolist() == [3.0, 5.0]


def test_joined_sum_leaves_masked_parts_to_the_caller() -> None:
    grads = torch.ones(1, 2)
    joined = Joined([("a", "a", None, grads), ("b", "b", None, grads)])
    out = {"a": torch.zeros(1), "b": torch.zeros(2)}
    mask = ParameterMask(torch.tensor([True, False]))
    assert joined.add_weighted_sum(torch.ones(1), None, out, {"a": mask}) == {("b", "b")}
    assert out["a"].tolist() == [0.0]
    assert out["b"].tolist() == [1.0, 1.0]


def test_joined_sum_goes_to_the_region_of_a_view() -> None:
    grads: Tensor = torch.tensor([[1.0, 2.0]])
    region = (1, torch.Size([2]), (3,))  # second column of a 2 x 3 parameter
    out = {"a": torch.zeros(2, 3)}
    Joined([("a", "column", region, grads)]).add_weighted_sum(torch.ones(1), None, out, {})
    assert out["a"].tolist() == [[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]]
    apart = {"a": torch.zeros(3, 2).mT}  # a region counts elements of contiguous memory
    assert Joined([("a", "column", region, grads)]).add_weighted_sum(torch.ones(1), None, apart, {}) == set()
