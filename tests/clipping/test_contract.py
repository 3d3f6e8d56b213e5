"""One contract for every clipping."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from lightning_dp.clipping import (
    AutomaticClipping,
    Clipping,
    ExplicitClipping,
    FactorClipping,
    FlatClipping,
    PerLayerClipping,
    PSACClipping,
    TopAgg,
)
from tests.cases import each
from tests.clipping.table import CONTRACT, Given, contribution_norms

FACTORS = [(clipping, groups) for clipping, groups in CONTRACT if isinstance(clipping, FactorClipping)]
SPECIAL = [0.0, 1e-45, 1e-38, 1e-20, 1e-15, 0.1, 1.0, 1.0000001, 1e19, 1e38, 3.4e38, math.inf, math.nan]


def norms_of(num_groups: int, num_samples: int = 1000) -> torch.Tensor:
    """Norms of all magnitudes: special values and random bits of float32 that are not negative, mixed in every way."""
    random = torch.Generator().manual_seed(num_groups)
    shape = (num_groups, num_samples)
    special = torch.tensor(SPECIAL)
    picked = special[torch.randint(len(SPECIAL), shape, generator=random)]
    bits = torch.randint(0x7F800001, shape, generator=random).to(torch.int32).view(torch.float32)
    largest = 2.0**127 * (1 + torch.rand(shape, generator=random))  # their reciprocals are subnormal
    either = torch.where(torch.rand(shape, generator=random) < 0.5, picked, bits)
    return torch.cat([picked, bits, largest, either, special.expand(num_groups, -1)], 1)


@each("clipping, num_groups", CONTRACT)
def test_contract_contribution_is_bounded(clipping: Clipping, num_groups: int) -> None:
    norms = norms_of(num_groups)
    added = contribution_norms(clipping, norms)
    assert torch.equal(contribution_norms(clipping, norms[:, :1]), added[:1])
    assert added.shape == norms.shape[1:]
    assert bool(torch.isfinite(added).all())
    broken = ~torch.isfinite(norms).all(dim=0)
    assert bool((added[broken] == 0).all())
    if clipping.bounded:
        # signs: the root of k ones, rounded; all others keep to their bound exactly
        signs = isinstance(clipping, TopAgg) and not clipping.keep_values
        assert bool((added <= clipping.sensitivity(num_groups) * (1 + 1e-15 * signs)).all())


@each("clipping, num_groups", FACTORS)
def test_contract_factors_are_finite_and_zero_for_broken_samples(clipping: Clipping, num_groups: int) -> None:
    norms = norms_of(num_groups)
    factors = clipping.factors(norms)
    assert factors.shape == norms.shape
    assert factors.dtype == norms.dtype
    assert bool(torch.isfinite(factors).all())
    assert bool((factors >= 0).all())
    assert bool((factors[:, ~torch.isfinite(norms).all(dim=0)] == 0).all())


@each("clipping, num_groups", FACTORS)
def test_contract_copies_and_keeps_its_input(clipping: Clipping, num_groups: int) -> None:
    norms = torch.full((num_groups, 4), 2.0)
    before = norms.clone()
    factors = clipping.factors(norms)
    assert torch.equal(norms, before)
    for twin in (pickle.loads(pickle.dumps(clipping)), copy.deepcopy(clipping)):
        assert twin == clipping
        assert torch.equal(twin.factors(norms), factors)


@each("clipping, num_groups", FACTORS)
def test_contract_empty_microbatch(clipping: Clipping, num_groups: int) -> None:
    assert clipping.factors(torch.zeros(num_groups, 0)).shape == (num_groups, 0)


@each("clipping, num_groups", CONTRACT)
def test_contract_bound_is_used(clipping: Clipping, num_groups: int) -> None:
    """A bound that is never reached would be safe and useless."""
    norms = torch.full((num_groups, 1), 1e10)
    reached = contribution_norms(clipping, norms).item() / clipping.sensitivity(num_groups)
    assert reached > 1 - 1e-6
    assert reached <= 1 + 1e-15 or not clipping.bounded


@each("clipping, num_groups", CONTRACT)
@each("factor", [0.5, 2.0])
def test_contract_scaled_moves_the_sensitivity_and_what_is_added(
    clipping: Clipping, num_groups: int, factor: float
) -> None:
    bound = clipping.sensitivity(num_groups)
    if (isinstance(clipping, TopAgg) and not clipping.keep_values) or not 1e-30 <= factor * bound <= 1e30:
        with pytest.raises(ValueError, match=r"factor=1 for votes|<= max_grad_norm <="):
            clipping.scaled(factor)
        return
    scaled = clipping.scaled(factor)
    assert type(scaled) is type(clipping)
    assert scaled.sensitivity(num_groups) == pytest.approx(factor * bound, rel=1e-15)
    assert clipping.sensitivity(num_groups) == bound
    if clipping.bounded:
        norms = torch.full((num_groups, 1), 1e10)
        torch.testing.assert_close(
            contribution_norms(scaled, norms), factor * contribution_norms(clipping, norms), rtol=1e-6, atol=0
        )


@each("clipping, num_groups", CONTRACT)
def test_contract_scaled_by_one_is_equal_bad_factors_refused(clipping: Clipping, num_groups: int) -> None:
    assert clipping.scaled(1.0) == clipping
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"0 < factor < inf, got factor={factor}"):
            clipping.scaled(factor)
    with pytest.raises(TypeError, match="factor to be a number"):
        clipping.scaled("2")  # type: ignore[arg-type]


def test_scaled_moves_every_bound_and_keeps_the_rest() -> None:
    assert FlatClipping(0.5).scaled(4.0) == FlatClipping(2.0)
    assert PerLayerClipping(max_grad_norms={"a": 0.5, "b": 2.0}).scaled(2.0).max_grad_norms == {"a": 1.0, "b": 4.0}
    assert PerLayerClipping(max_grad_norms=(0.5, 2.0)).scaled(2.0).max_grad_norms == (1.0, 4.0)
    assert AutomaticClipping(0.3, 1.0, True).scaled(2.0) == AutomaticClipping(0.3, 2.0, True)
    assert PSACClipping(0.3, 1.0, True).scaled(2.0) == PSACClipping(0.3, 2.0, True)
    assert TopAgg(3, keep_values=True).scaled(2.0) == TopAgg(3, keep_values=True, max_grad_norm=2.0)


@each("clipping, num_groups", FACTORS)
def test_contract_finish_divides_by_expected_batch_size(clipping: Clipping, num_groups: int) -> None:
    noisy = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    expected = noisy * (1 / 7)
    out = torch.full_like(noisy, math.nan)
    clipping.finish(noisy, 7, out)
    assert torch.equal(out, expected)
    clipping.finish(noisy, 7, noisy)
    assert torch.equal(noisy, expected)


@each("clipping, num_groups", FACTORS)
def test_contract_scaling_clippings_do_not_depend_on_size(clipping: Clipping, num_groups: int) -> None:
    assert clipping.for_coordinates(5) is clipping


@each("clipping, num_groups", CONTRACT)
def test_contract_contribution_adds_what_it_states(clipping: Clipping, num_groups: int) -> None:
    """Either factors or one explicit sum reaches the accumulator, and the stated norms are those of the
    contributions.
    """
    samples = Given(torch.tensor([[0.0, 1e-3, 1.0, 50.0, torch.inf]]).repeat(num_groups, 1))
    contribution = clipping.contribution(samples)
    contribution.add()
    assert (samples.factors.numel() == 0) != (samples.total.numel() == 0)
    expected = contribution_norms(clipping, samples.norms).float()
    torch.testing.assert_close(contribution.norms[:4], expected[:4])
    if samples.total.numel():
        torch.testing.assert_close(samples.total, contribution.values.sum(0))
    else:
        assert torch.equal(samples.factors, clipping.factors(samples.norms))


@each("clipping, num_groups", CONTRACT)
def test_contract_owners_of_factors_are_refused_by_name(clipping: Clipping, num_groups: int) -> None:
    if isinstance(clipping, FactorClipping):
        clipping.check_scales("canaries", "Leave them out.")
        return
    with pytest.raises(ValueError, match=f"by a factor with canaries, got '{clipping.name}'. Leave them out."):
        clipping.check_scales("canaries", "Leave them out.")


@each("scale", [0.0, 1e-30, 2e-24, 1e-23, 1e-22, 1e-18, 1e-3, 1.0, 1e15, 1e30])
@each(
    "clipping",
    [
        FlatClipping(0.3),
        AutomaticClipping(),
        AutomaticClipping(gamma=0.0),
        PSACClipping(),
        PSACClipping(gamma=0.0, max_grad_norm=0.3),
        TopAgg(100),
        TopAgg(100, keep_values=True, max_grad_norm=0.3),
    ],
)
def test_contribution_of_real_gradients_is_bounded(clipping: Clipping, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grads_BP = torch.randn(16, 1000, generator=generator) * scale
    if isinstance(clipping, ExplicitClipping):
        added = clipping.contributions(grads_BP)
    else:
        factors = clipping.factors(torch.linalg.vector_norm(grads_BP, dim=1)[None])[0]
        added = torch.where(factors[:, None] == 0, 0.0, factors[:, None] * grads_BP)
    assert bool((added.double().norm(dim=1) <= clipping.sensitivity(1) * (1 + 1e-6)).all())
