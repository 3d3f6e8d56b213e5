"""Clipping: one contract for every kind, then what each does."""

from __future__ import annotations

import copy
import math
import pickle
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.clipping import (
    AutomaticClipping,
    Clipping,
    FlatClipping,
    NoClipping,
    PerLayerClipping,
    make_clipping,
)

# clipping, number of groups; a new clipping enters this table
CONTRACT: list[tuple[Clipping, int]] = [
    (FlatClipping(1.0), 1),
    (FlatClipping(0.1), 1),
    (FlatClipping(1e-6), 1),
    (FlatClipping(3e7), 1),
    (PerLayerClipping(0.7), 1),
    (PerLayerClipping(0.7), 3),
    (PerLayerClipping(max_grad_norms=(0.1, 1e-5, 30.0)), 3),
    (PerLayerClipping(max_grad_norms={"a": 0.1, "b": 2.0}), 2),
    (AutomaticClipping(), 1),
    (AutomaticClipping(gamma=0.0), 1),
    (AutomaticClipping(gamma=1e-30), 1),
    (AutomaticClipping(max_grad_norm=1e-3), 1),
    (AutomaticClipping(gamma=0.0, max_grad_norm=1e30), 1),
    (AutomaticClipping(per_layer=True), 3),
    (NoClipping(), 2),
]
IDS = [f"{clipping}-{groups}" for clipping, groups in CONTRACT]
SPECIAL = [0.0, 1e-45, 1e-38, 1e-20, 1e-15, 0.1, 1.0, 1.0000001, 1e19, 1e38, 3.4e38, math.inf, math.nan]
NORMS = st.one_of(st.sampled_from(SPECIAL), st.floats(min_value=0.0, width=32, allow_nan=False))


def contributions(clipping: Clipping, norms: torch.Tensor) -> torch.Tensor:
    """Norm of each sample's contribution over all groups, in float64; 0 * inf counts as 0."""
    factors = clipping.factors(norms)
    parts = torch.where(factors == 0, 0.0, factors.double() * norms.double())
    return parts.square().sum(dim=0).sqrt()


@pytest.mark.parametrize(("clipping", "num_groups"), CONTRACT, ids=IDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_contract_contribution_is_bounded(clipping: Clipping, num_groups: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(NORMS, min_size=num_groups, max_size=num_groups), min_size=1, max_size=5))
    norms = torch.tensor(rows, dtype=torch.float32).T.contiguous()
    factors = clipping.factors(norms)
    assert factors.shape == norms.shape
    assert factors.dtype == norms.dtype
    assert bool(torch.isfinite(factors).all())
    assert bool((factors >= 0).all())
    broken = ~torch.isfinite(norms).all(dim=0)
    assert bool((factors[:, broken] == 0).all())
    if clipping.bounded:
        assert bool((contributions(clipping, norms) <= clipping.sensitivity(num_groups)).all())


@pytest.mark.parametrize(("clipping", "num_groups"), CONTRACT, ids=IDS)
def test_contract_copies_and_keeps_its_input(clipping: Clipping, num_groups: int) -> None:
    norms = torch.full((num_groups, 4), 2.0)
    before = norms.clone()
    factors = clipping.factors(norms)
    assert torch.equal(norms, before)
    for twin in (pickle.loads(pickle.dumps(clipping)), copy.deepcopy(clipping)):
        assert twin == clipping
        assert torch.equal(twin.factors(norms), factors)


@pytest.mark.parametrize(("clipping", "num_groups"), CONTRACT, ids=IDS)
def test_contract_empty_microbatch(clipping: Clipping, num_groups: int) -> None:
    assert clipping.factors(torch.zeros(num_groups, 0)).shape == (num_groups, 0)


@pytest.mark.parametrize(("clipping", "num_groups"), CONTRACT, ids=IDS)
def test_contract_bound_is_used(clipping: Clipping, num_groups: int) -> None:
    """A bound that is never reached would be safe and useless."""
    norms = torch.full((num_groups, 1), 1e10)
    reached = contributions(clipping, norms).item() / clipping.sensitivity(num_groups)
    assert reached > 1 - 1e-6
    assert reached <= 1 or not clipping.bounded


@pytest.mark.parametrize("scale", [0.0, 1e-30, 2e-24, 1e-23, 1e-22, 1e-18, 1e-3, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("clipping", [FlatClipping(0.3), AutomaticClipping(), AutomaticClipping(gamma=0.0)], ids=str)
def test_contribution_of_real_gradients_is_bounded(clipping: Clipping, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grads_BP = torch.randn(16, 1000, generator=generator) * scale
    factors = clipping.factors(torch.linalg.vector_norm(grads_BP, dim=1)[None])[0]
    scaled = torch.where(factors[:, None] == 0, 0.0, factors[:, None] * grads_BP)
    assert bool((scaled.double().norm(dim=1) <= clipping.sensitivity(1) * (1 + 1e-6)).all())


def test_flat_leaves_small_gradients_alone_and_scales_large_ones() -> None:
    factors = FlatClipping(2.0).factors(torch.tensor([[0.0, 1.0, 1.99, 4.0, 8.0]]))
    torch.testing.assert_close(factors, torch.tensor([[1.0, 1.0, 1.0, 0.5, 0.25]]), rtol=1e-6, atol=0)
    assert factors[0, :3].tolist() == [1.0, 1.0, 1.0]


def test_per_layer_groups_by_owning_module() -> None:
    names = ["scale", "conv.weight", "head.0.weight", "conv.bias", "head.1.weight"]
    groups = PerLayerClipping(1.0).groups(names)
    assert groups == [["scale"], ["conv.weight", "conv.bias"], ["head.0.weight"], ["head.1.weight"]]
    assert FlatClipping(1.0).groups(dict.fromkeys(names)) == [names]
    assert AutomaticClipping().groups(names) == [names]
    assert AutomaticClipping(per_layer=True).groups(names) == groups


def test_per_layer_default_bound_is_divided_by_root_of_groups() -> None:
    clipping = PerLayerClipping(2.0)
    factors = clipping.factors(torch.full((4, 1), 2.0))
    torch.testing.assert_close(factors, torch.full((4, 1), 0.5), rtol=1e-6, atol=0)
    assert clipping.sensitivity(4) == 2.0


def test_per_layer_sensitivity_is_root_of_sum_of_squares() -> None:
    assert PerLayerClipping(max_grad_norms=[3.0, 4.0]).sensitivity(2) == 5.0
    assert PerLayerClipping(max_grad_norms={"a": 1.0, "b": 2.0, "c": 2.0}).sensitivity(3) == 3.0


def test_per_layer_mapping_follows_names_not_positions() -> None:
    clipping = PerLayerClipping(max_grad_norms={"head": 0.5, "": 2.0})
    assert clipping.groups(["bare", "head.weight"]) == [["head.weight"], ["bare"]]
    factors = clipping.factors(torch.tensor([[1.0], [4.0]]))
    torch.testing.assert_close(factors, torch.tensor([[0.5], [0.5]]), rtol=1e-6, atol=0)


def test_per_layer_bounds_cannot_be_changed_from_outside() -> None:
    bounds = {"a": 3.0, "b": 4.0}
    clipping = PerLayerClipping(max_grad_norms=MappingProxyType(bounds))
    bounds["a"] = 1e6
    assert clipping.sensitivity(2) == 5.0


def test_per_layer_refuses_bounds_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"name exactly the modules \['a', 'b'\], got \['a'\]"):
        PerLayerClipping(max_grad_norms={"a": 1.0}).groups(["a.weight", "b.weight"])
    with pytest.raises(ValueError, match=r"Expected 2 group"):
        PerLayerClipping(max_grad_norms=(1.0, 2.0)).sensitivity(3)
    with pytest.raises(ValueError, match=r"Expected 2 group"):
        PerLayerClipping(max_grad_norms=(1.0, 2.0)).factors(torch.ones(3, 1))


def test_one_bad_group_silences_the_whole_sample() -> None:
    norms = torch.tensor([[1.0, 1.0, 1.0], [1.0, torch.nan, torch.inf]])
    factors = PerLayerClipping(1.0).factors(norms)
    assert bool((factors[:, 0] > 0).all())
    assert bool((factors[:, 1:] == 0).all())


def test_automatic_formulas() -> None:
    norms = torch.tensor([[0.0, 0.01, 0.99, 99.99]])
    torch.testing.assert_close(
        AutomaticClipping(gamma=0.01).factors(norms), torch.tensor([[100.0, 50.0, 1.0, 0.01]]), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        AutomaticClipping(gamma=0.0).factors(norms),
        torch.tensor([[0.0, 100.0, 1 / 0.99, 1 / 99.99]]),
        rtol=1e-6,
        atol=0,
    )
    dependent = AutomaticClipping(gamma=0.01, max_grad_norm=3.0)
    torch.testing.assert_close(dependent.factors(norms), 3 * AutomaticClipping().factors(norms), rtol=1e-6, atol=0)
    assert (AutomaticClipping().sensitivity(1), dependent.sensitivity(1)) == (1.0, 3.0)


def test_only_no_clipping_is_unbounded() -> None:
    assert not NoClipping().bounded
    assert all(clipping.bounded for clipping, _ in CONTRACT if not isinstance(clipping, NoClipping))
    assert NoClipping(max_grad_norm=0.5).sensitivity(2) == 0.5


def test_make_clipping_by_name() -> None:
    made = {name: make_clipping(name, 0.5) for name in ("flat", "per_layer", "automatic", "none")}
    assert {name: clipping.name for name, clipping in made.items()} == {name: name for name in made}
    assert made["flat"] == FlatClipping(0.5)
    assert made["per_layer"] == PerLayerClipping(0.5)
    assert made["automatic"].sensitivity(1) == 1.0
    own = AutomaticClipping(gamma=0.5)
    assert make_clipping(own, 0.5) is own


def test_make_clipping_refuses_unknown() -> None:
    with pytest.raises(ValueError, match=r"one of \['flat', 'per_layer', 'automatic', 'none'\], got clipping='ghost'"):
        make_clipping("ghost", 1.0)
    with pytest.raises(TypeError, match="name of a clipping"):
        make_clipping(3, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_bounds_out_of_range_are_refused(bound: float) -> None:
    for make in (
        FlatClipping,
        PerLayerClipping,
        NoClipping,
        lambda value: AutomaticClipping(max_grad_norm=value),
        lambda value: make_clipping("flat", value),
    ):
        with pytest.raises(ValueError, match="max_grad_norm"):
            make(bound)
    with pytest.raises(ValueError, match=r"max_grad_norms\[1\]"):
        PerLayerClipping(max_grad_norms=(1.0, bound))


@pytest.mark.parametrize("gamma", [-1.0, math.inf, math.nan])
def test_gamma_out_of_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        AutomaticClipping(gamma=gamma)


def test_factors_refuse_imprecise_or_misshapen_norms() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        FlatClipping(1.0).factors(torch.ones(1, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="shape"):
        FlatClipping(1.0).factors(torch.ones(3))
    with pytest.raises(ValueError, match="Expected 1 group"):
        FlatClipping(1.0).factors(torch.ones(2, 3))
