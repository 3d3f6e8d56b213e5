"""What each clipping does; the contract of all of them is in ``test_contract.py``."""

from __future__ import annotations

import math
from types import MappingProxyType

import pytest
import torch

from lightning_dp.clipping import (
    AutomaticClipping,
    FlatClipping,
    NoClipping,
    PerLayerClipping,
    PSACClipping,
    TopAgg,
    make_clipping,
)
from tests.clipping.table import CONTRACT


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
    assert PSACClipping(per_layer=True).groups(names) == groups
    assert TopAgg(3).groups(names) == [names]


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


def test_auto_v_leaves_a_zero_gradient_at_zero() -> None:
    """0 / 0 is zero, not NaN; also where one layer's gradient is zero and the other's is not."""
    norms = torch.tensor([[0.0, 1e-45, 1e-16, 2.0]])
    factors = AutomaticClipping(gamma=0.0).factors(norms)
    assert factors[0, :3].tolist() == [0.0, 0.0, 0.0]
    assert (factors * norms)[0, 3].item() == pytest.approx(1.0, rel=1e-6)
    per_layer = AutomaticClipping(gamma=0.0, per_layer=True)
    layers = torch.tensor([[0.0], [4.0]])
    torch.testing.assert_close(
        per_layer.factors(layers), torch.tensor([[0.0], [1 / (4 * math.sqrt(2))]]), rtol=1e-6, atol=0
    )
    assert (per_layer.groups(["a.weight", "b.weight"]), per_layer.sensitivity(2)) == ([["a.weight"], ["b.weight"]], 1.0)


def test_psac_formula() -> None:
    norms = torch.tensor([[0.0, 0.01, 1.0, 100.0]])
    expected = [3 / (x + 0.01 / (x + 0.01)) for x in norms[0].tolist()]
    factors = PSACClipping(gamma=0.01, max_grad_norm=3.0).factors(norms)
    torch.testing.assert_close(factors, torch.tensor([expected]), rtol=1e-6, atol=0)
    assert PSACClipping(max_grad_norm=3.0).sensitivity(1) == 3.0
    layers = PSACClipping(gamma=0.01, max_grad_norm=3.0, per_layer=True).factors(norms.T)
    torch.testing.assert_close(layers, torch.tensor([expected]).T / 2, rtol=1e-6, atol=0)


def test_psac_weight_rises_then_falls_contribution_grows() -> None:
    """Largest at sqrt(gamma) - gamma; AUTO-S falls throughout and so lifts the smallest gradients most."""
    gamma = 0.01
    peak = math.sqrt(gamma) - gamma
    norms = torch.linspace(0, 3, 3001, dtype=torch.float64)[None]
    factors = PSACClipping(gamma=gamma).factors(norms)[0]
    rising, falling = factors[norms[0] <= peak], factors[norms[0] >= peak]
    assert bool((rising.diff() > 0).all())
    assert bool((falling.diff() < 0).all())
    assert factors.max().item() == pytest.approx(1 / (2 * math.sqrt(gamma) - gamma), rel=1e-5)
    assert bool(((factors * norms[0]).diff() > 0).all())
    automatic = AutomaticClipping(gamma=gamma).factors(norms)[0]
    assert bool((automatic.diff() < 0).all())
    assert automatic[0] / factors[0] == pytest.approx(1 / gamma)


def test_psac_without_gamma_is_auto_v() -> None:
    norms = torch.tensor([[0.0, 1e-16, 0.5, 1e30, math.inf, math.nan]])
    assert torch.equal(PSACClipping(gamma=0.0).factors(norms), AutomaticClipping(gamma=0.0).factors(norms))


def test_only_no_clipping_is_unbounded() -> None:
    assert not NoClipping().bounded
    assert all(clipping.bounded for clipping, _ in CONTRACT if not isinstance(clipping, NoClipping))
    assert NoClipping(max_grad_norm=0.5).sensitivity(2) == 0.5


def test_make_clipping_by_name() -> None:
    made = {name: make_clipping(name, 0.5) for name in ("flat", "per_layer", "automatic", "psac", "none")}
    assert {name: clipping.name for name, clipping in made.items()} == {name: name for name in made}
    assert made["flat"] == FlatClipping(0.5)
    assert made["per_layer"] == PerLayerClipping(0.5)
    assert made["automatic"].sensitivity(1) == made["psac"].sensitivity(1) == 1.0
    own = AutomaticClipping(gamma=0.5)
    assert make_clipping(own, 0.5) is own


def test_make_clipping_refuses_unknown() -> None:
    with pytest.raises(
        ValueError, match=r"one of \['flat', 'per_layer', 'automatic', 'psac', 'none'\], got clipping='ghost'"
    ):
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
        lambda value: PSACClipping(max_grad_norm=value),
        lambda value: TopAgg(1, max_grad_norm=value),
        lambda value: make_clipping("flat", value),
    ):
        with pytest.raises(ValueError, match="max_grad_norm"):
            make(bound)
    with pytest.raises(ValueError, match=r"max_grad_norms\[1\]"):
        PerLayerClipping(max_grad_norms=(1.0, bound))


@pytest.mark.parametrize("gamma", [-1.0, math.inf, math.nan])
def test_gamma_out_of_range_is_refused(gamma: float) -> None:
    for kind in (AutomaticClipping, PSACClipping):
        with pytest.raises(ValueError, match=f"gamma < inf, got gamma={gamma}"):
            kind(gamma=gamma)


def test_factors_refuse_imprecise_or_misshapen_norms() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        FlatClipping(1.0).factors(torch.ones(1, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="shape"):
        FlatClipping(1.0).factors(torch.ones(3))
    with pytest.raises(ValueError, match="Expected 1 group"):
        FlatClipping(1.0).factors(torch.ones(2, 3))
