"""Private API of torch: each function does what its one line says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_dp.per_sample import _torch


class Seen(TorchFunctionMode):
    """Counts the operations that report themselves."""

    num = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.num += 1
        return func(*args, **(kwargs or {}))


class Tracked(Tensor):
    """Counts the operations that a tensor reports."""

    num = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.num += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_operations_report_themselves_to_nobody_where_told() -> None:
    tensor = torch.ones(2).as_subclass(Tracked)
    Tracked.num = 0
    with Seen() as seen:
        with _torch.unreported():
            torch.add(tensor, 1)
        assert (Tracked.num, seen.num) == (0, 1)
        with _torch.unfollowed():
            torch.add(tensor, 1)
        assert (Tracked.num, seen.num) == (0, 1)


def test_a_backward_is_seen_with_what_it_keeps() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    for keep in (True, False):
        y = x * 2
        y.register_hook(lambda grad: seen.append((_torch.in_backward(), _torch.keeps_graph())))
        y.sum().backward(retain_graph=keep)
    assert not _torch.in_backward()
    assert seen == [(True, True), (True, False)]


def test_an_own_view_is_no_view() -> None:
    base = torch.ones(4, requires_grad=True) * 2
    assert _torch.is_view(base[:2])
    alone = _torch.own_view(base[:2])
    assert not _torch.is_view(alone)
    assert alone.data_ptr() == base.data_ptr()


def test_tensors_within_vmap_are_seen() -> None:
    seen: list[bool] = []
    torch.vmap(lambda row: (seen.append(_torch.is_mapped(row)), row)[1])(torch.ones(2, 3))
    assert seen == [True]
    assert not _torch.is_mapped(torch.ones(2))


def test_forward_mode_is_seen() -> None:
    with torch.autograd.forward_ad.dual_level():
        assert _torch.is_dual()
    assert not _torch.is_dual()


def test_transforms_are_seen_around_any_tensor() -> None:
    seen: list[bool] = []
    torch.vmap(lambda row: (seen.append(_torch.in_transform()), row)[1])(torch.ones(2, 3))
    assert seen == [True]
    assert not _torch.in_transform()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when its compiler is imported
def test_compiled_modules_are_found() -> None:
    in_place = nn.Linear(2, 2)
    assert not _torch.is_compiled(in_place)
    in_place.compile()
    assert _torch.is_compiled(in_place)
    assert _torch.is_compiled(torch.compile(nn.Linear(2, 2)))


def test_sums_of_several_tensors() -> None:
    tensors, targets = [torch.full((4,), 3.0), torch.full((9,), 2.0)], [torch.ones(4), torch.ones(9)]
    _torch.add_scaled(targets, tensors, 0.5)
    assert [float(target[0]) for target in targets] == [2.5, 2.0]


def test_schemas_and_kernels_are_named() -> None:
    name, arguments = _torch.arguments_of(torch.ops.aten.add_.Tensor)
    assert (name, [argument.name for argument in arguments]) == ("add", ["self", "other", "alpha"])
    assert _torch.fused_kernel("lstm") is torch._VF.lstm


def test_differentiable_operations_are_counted() -> None:
    x = torch.ones(2, requires_grad=True)
    before = _torch.num_operations()
    assert _torch.num_operations() == before
    (x * 2).sum()
    assert _torch.num_operations() == before + 2
    with torch.no_grad():
        x.exp()
    assert _torch.num_operations() == before + 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when its compiler is imported
def test_code_runs_uncompiled_and_then_as_the_user_said() -> None:
    compiled: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(True)
        return graph.forward

    torch.compiler.reset()
    with torch.compiler.set_stance("default"):  # an engine of another test may have left another one
        function = torch.compile(lambda x: x * 2, backend=backend)
        with torch.compiler.set_stance("eager_on_recompile"):
            with _torch.uncompiled():
                function(torch.ones(2))
            function(torch.ones(2))
        with _torch.uncompiled():
            function(torch.ones(2))
        assert not compiled
        function(torch.ones(2))
        assert compiled


@pytest.mark.parametrize(("out_dims", "randomness", "calls"), [(0, "error", 3), (1, "different", 3), (0, "same", 1)])
def test_maps_over_reporting_tensors_run_per_entry(out_dims: int, randomness: str, calls: int) -> None:
    tensor, x, seen = torch.randn(2, 3, 4).as_subclass(Tracked), torch.randn(5, 4), list[Any]()

    def function(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(weight)
        return x @ weight.T, 2 * x

    mapped = torch.vmap(function, (1, None), (out_dims, None), randomness)
    expected = mapped(tensor.as_subclass(Tensor), x)
    seen.clear()
    with _torch.UnrolledMaps(lambda one: isinstance(one, Tracked)):
        for found, true in zip(mapped(tensor, x), expected, strict=True):
            torch.testing.assert_close(found.as_subclass(Tensor), true)
    assert len(seen) == calls
    mapped(tensor, x)
    assert len(seen) == calls + 1
