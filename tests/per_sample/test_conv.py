"""ConvRule against a loop over batches of one, in float64, for every route."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_dp.per_sample.rules import conv as conv_rules
from lightning_dp.per_sample.rules import conv_routes, unfolding
from lightning_dp.per_sample.rules.base import Call
from lightning_dp.per_sample.rules.conv import ConvRule
from lightning_dp.per_sample.rules.conv_routes import ConvShape, Route, choose_route
from lightning_dp.per_sample.rules.unfolding import gram
from tests import reference
from tests.per_sample.checks import parameter_masks, weighted_sum

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ROUTES: tuple[Route, ...] = ("grouped", "unfold", "gram")
BOTH = {"weight", "bias"}

# torch's own remark on even kernels, made by the layers under test
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def made_calls(layer: nn.Module, inputs: Sequence[Tensor], multiplicity: int = 1, seed: int = 0) -> list[Call]:
    """Run the layer on every input and pair it with a random backprop."""
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for x in inputs:
        out = layer(x).detach()
        backprop = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        calls.append(Call(inputs=(x,), kwargs={}, activation=x, backprop=backprop, multiplicity=multiplicity))
    return calls


def looped(layer: nn.Module, calls: Sequence[Call], batch_size: int) -> dict[str, Tensor]:
    def loss_of(i: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for call in calls:
            rows = slice(i * call.multiplicity, (i + 1) * call.multiplicity)
            total = total + (layer(call.activation[rows]) * call.backprop[rows]).sum()
        return total

    return reference.per_sample_gradients(layer, loss_of, batch_size)


def check_against_loop(layer: nn.Module, calls: Sequence[Call], batch_size: int) -> None:
    names = {name for name, _ in layer.named_parameters()}
    expected = looped(layer, calls, batch_size)
    factors = torch.linspace(-1, 2, batch_size, dtype=torch.float64)
    rule = ConvRule()
    with torch.no_grad():
        grads = rule.per_sample(layer, calls, batch_size, names)
        norms = rule.squared_norms(layer, calls, batch_size, names)
        sums = weighted_sum(rule, layer, calls, factors, batch_size, names)
        masks = {name: torch.rand_like(p) < 0.5 for name, p in layer.named_parameters()}
        masked = rule.masked_squared_norms(layer, calls, batch_size, parameter_masks(masks))
    assert set(grads) == set(norms) == set(sums) == set(masked) == names
    expected_sums = reference.weighted_sum(expected, factors)
    for name in names:
        torch.testing.assert_close(grads[name], expected[name])
        torch.testing.assert_close(norms[name], reference.squared_norms(expected, [[name]])[0])
        torch.testing.assert_close(sums[name], expected_sums[name])
        torch.testing.assert_close(masked[name], reference.squared_norms(expected, [[name]], masks)[0])


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Route:
    """Force one route; where only norms may take it ("gram") gradients are unfolded."""
    forced: Route = request.param

    def chosen(shape: ConvShape, *, norms_only: bool) -> Route:
        return "unfold" if forced == "gram" and not norms_only else forced

    monkeypatch.setattr(conv_rules, "choose_route", chosen)
    return forced


CASES = [
    (1, {"kernel_size": 3}, (7,)),
    (1, {"kernel_size": 4, "padding": "same", "dilation": 3}, (9,)),
    (1, {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2}, (8,)),
    (2, {"kernel_size": 3}, (6, 5)),
    (2, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)}, (8, 9)),
    (2, {"kernel_size": (4, 3), "padding": "same"}, (6, 5)),
    (2, {"kernel_size": 3, "padding": "same"}, (5, 4)),
    (2, {"kernel_size": 3, "padding": "valid", "groups": 2}, (5, 4)),
    (2, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}, (5, 6)),
    (2, {"kernel_size": (2, 3), "padding": "same", "padding_mode": "replicate"}, (5, 6)),
    (2, {"kernel_size": 3, "groups": 4, "padding": 1, "bias": False}, (5, 5)),
    (2, {"kernel_size": 1, "stride": 2}, (5, 6)),
    (2, {"kernel_size": (5, 4)}, (5, 4)),
    (3, {"kernel_size": (1, 2, 3), "stride": (1, 2, 1), "padding": (0, 1, 2), "groups": 2}, (3, 4, 5)),
    (3, {"kernel_size": (2, 2, 3), "padding": "same", "padding_mode": "circular"}, (3, 4, 5)),
]


@pytest.mark.parametrize(("axes", "options", "size"), CASES)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.one_in(3)
def test_conv_matches_loop(route: Route, axes: int, options: dict, size: tuple[int, ...], batch_size: int) -> None:
    layer = CONVS[axes](4, 8, dtype=torch.float64, **options)
    x = torch.randn(batch_size, 4, *size, dtype=torch.float64)
    check_against_loop(layer, made_calls(layer, [x]), batch_size)


@given(
    axes=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    size=st.integers(5, 7),
    multiplicity=st.integers(1, 2),
    forced=st.sampled_from(ROUTES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_conv_matches_loop_for_drawn_geometries(
    axes, kernel, stride, dilation, padding, groups, mode, size, multiplicity, forced, seed
) -> None:
    torch.manual_seed(seed)
    options = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "padding_mode": mode}
    layer = CONVS[axes](2, 4, kernel, dtype=torch.float64, **options)
    x = torch.randn(2 * multiplicity, 2, *[size] * axes, dtype=torch.float64)
    calls = made_calls(layer, [x], multiplicity, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            conv_rules,
            "choose_route",
            lambda shape, norms_only: "unfold" if forced == "gram" and not norms_only else forced,
        )
        check_against_loop(layer, calls, 2)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_conv_adds_calls_and_rows_before_the_norm(route: Route, stride: int) -> None:
    layer = nn.Conv2d(2, 6, 3, stride, padding=1, groups=2, dtype=torch.float64)
    second = (5, 4) if route == "gram" else (3, 3)
    inputs = [torch.randn(3 * 2, 2, *size, dtype=torch.float64) for size in ((5, 4), second)]
    check_against_loop(layer, made_calls(layer, inputs, multiplicity=2), 3)


def test_conv_of_two_map_sizes_does_not_take_gram_matrices() -> None:
    layer = nn.Conv2d(32, 32, 3, padding=1, dtype=torch.float64)
    inputs = [torch.randn(2, 32, size, size, dtype=torch.float64) for size in (2, 3)]
    for used in (inputs, inputs[:1]):
        calls = made_calls(layer, used)
        shape = conv_routes.shape_of(layer, calls, 2)
        assert (choose_route(shape, norms_only=True) == "gram") is (len(used) == 1)
        check_against_loop(layer, calls, 2)


@pytest.mark.parametrize(("kernel", "stride", "sizes"), [(3, 1, [64]), (3, 2, [16] * 4), (7, 1, [4]), (2, 2, [16])])
def test_gram_matrices_are_at_most_those_of_unfolding(
    kernel: int, stride: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def seeing(x: torch.Tensor) -> torch.Tensor:
        seen.append(x[0, 0].numel())
        return gram(x)

    monkeypatch.setattr(unfolding, "gram", seeing)
    layer = nn.Conv2d(2, 3, kernel, stride, padding=1 if kernel == 3 else 0, dtype=torch.float64)
    call = made_calls(layer, [torch.randn(2, 2, 8, 8, dtype=torch.float64)])[0]
    norms = conv_rules._gram_norms(layer, [call], 2)
    assert seen == sizes
    torch.testing.assert_close(norms, reference.squared_norms(looped(layer, [call], 2), [["weight"]])[0])


def test_conv_of_one_position_with_other_strides() -> None:
    """Axes of length 1 may have any stride, by which torch's kernels would guess another memory format."""
    layer = nn.Conv1d(4, 4, 3, padding=1, dtype=torch.float64)
    check_against_loop(layer, made_calls(layer, [torch.randn(2, 1, 4, dtype=torch.float64).transpose(1, 2)]), 2)


def test_conv_blocks_do_not_change_the_numbers(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_routes, "BLOCK_ELEMENTS", {"grouped": 300, "unfold": 1000, "gram": 8000}[route])
    monkeypatch.setattr(conv_routes, "CACHED_ELEMENTS", 1000)
    layer = nn.Conv2d(2, 4, 3, dtype=torch.float64)
    calls = made_calls(layer, [torch.randn(7 * 2, 2, 5, 5, dtype=torch.float64)], multiplicity=2)
    seen = list(conv_routes.blocks(7, conv_routes.shape_of(layer, calls, 7), route))
    assert len(seen) == 4
    assert [i for low, high in seen for i in range(low, high)] == list(range(7))
    check_against_loop(layer, calls, 7)


def test_conv_of_an_empty_batch_is_empty(route: Route) -> None:
    layer = nn.Conv2d(2, 4, 3)
    call = Call(
        inputs=(), kwargs={}, activation=torch.empty(0, 2, 5, 5), backprop=torch.empty(0, 4, 3, 3), multiplicity=1
    )
    rule = ConvRule()
    assert rule.per_sample(layer, [call], 0, BOTH)["weight"].shape == (0, 4, 2, 3, 3)
    assert {name: norm.shape for name, norm in rule.squared_norms(layer, [call], 0, BOTH).items()} == {
        "weight": (0,),
        "bias": (0,),
    }
    sums = weighted_sum(rule, layer, [call], torch.empty(0), 0, BOTH)
    torch.testing.assert_close(sums["weight"], torch.zeros(4, 2, 3, 3))
    torch.testing.assert_close(sums["bias"], torch.zeros(4))


def test_conv_returns_only_the_asked_names() -> None:
    layer = nn.Conv1d(2, 4, 3)
    calls = made_calls(layer, [torch.randn(2, 2, 6)])
    rule = ConvRule()
    for name in ("weight", "bias"):
        assert list(rule.per_sample(layer, calls, 2, {name})) == [name]
        assert list(rule.squared_norms(layer, calls, 2, {name})) == [name]
        assert list(weighted_sum(rule, layer, calls, torch.ones(2), 2, {name})) == [name]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["activation", "backprop"])
def test_conv_keeps_a_non_finite_sample_to_itself(route: Route, bad: float, where: str) -> None:
    layer = nn.Conv2d(2, 4, 3, dtype=torch.float64)
    calls = made_calls(layer, [torch.randn(3, 2, 5, 5, dtype=torch.float64)])
    expected = looped(layer, calls, 3)
    getattr(calls[0], where)[1, 0, 1, 1] = bad
    rule = ConvRule()
    norms = rule.squared_norms(layer, calls, 3, BOTH)
    assert not torch.isfinite(norms["weight"][1])
    factors = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    sums = weighted_sum(rule, layer, calls, factors, 3, BOTH)
    for name, grads in expected.items():
        torch.testing.assert_close(norms[name][[0, 2]], reference.squared_norms(expected, [[name]])[0][[0, 2]])
        torch.testing.assert_close(sums[name], 0.5 * grads[0] + 2 * grads[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_conv_accumulates_in_float32_or_better(route: Route, dtype: torch.dtype) -> None:
    layer = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    call = made_calls(layer, [torch.randn(4, 3, 9, 9, dtype=torch.float64)])[0]
    rounded = Call((), {}, call.activation.to(dtype), call.backprop.to(dtype), 1)
    exact = Call((), {}, rounded.activation.double(), rounded.backprop.double(), 1)
    rule, names = ConvRule(), {"weight", "bias"}
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    factors = torch.rand(4)
    for got, expected in (
        (rule.per_sample(layer, [rounded], 4, names), rule.per_sample(layer, [exact], 4, names)),
        (rule.squared_norms(layer, [rounded], 4, names), rule.squared_norms(layer, [exact], 4, names)),
        (
            weighted_sum(rule, layer, [rounded], factors, 4, names),
            weighted_sum(rule, layer, [exact], factors, 4, names),
        ),
    ):
        for name in names:
            assert got[name].dtype == accumulated
            torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-4, atol=1e-4)


def test_gram_route_is_for_small_maps_in_wide_layers() -> None:
    wide = ConvShape(device="cpu", groups=1, in_width=2304, out_width=256, positions=16, kernel=9)
    assert choose_route(wide, norms_only=True) == "gram"
    assert choose_route(wide, norms_only=False) == "unfold"
    layer = nn.Conv2d(64, 64, 3, padding=1)
    for size, keeps in ((2, False), (16, True)):
        assert ConvRule().materialises(layer, made_calls(layer, [torch.randn(1, 64, size, size)]), 1, "weight") is keeps
    # a wide layer on a small map: slow as a grouped convolution
    small_map = wide._replace(in_width=576, out_width=128, positions=64)
    assert choose_route(small_map, norms_only=False) == "unfold"
    assert choose_route(small_map._replace(positions=256), norms_only=False) == "grouped"
    large_map = wide._replace(in_width=144, out_width=16, positions=1024)
    assert choose_route(large_map, norms_only=True) == "grouped"
    assert choose_route(large_map._replace(device="cuda"), norms_only=True) == "unfold"
    assert choose_route(large_map._replace(kernel=1), norms_only=True) == "unfold"
    assert choose_route(large_map._replace(device="cuda", groups=16), norms_only=True) == "grouped"
