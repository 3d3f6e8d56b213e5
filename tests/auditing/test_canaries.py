"""Gradient canaries: in the sum as a record would be, out of the way of real records, scored from releases alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import PrivacyError
from lightning_dp.auditing import Canaries, GradientCanaries
from lightning_dp.clipping import AutomaticClipping, Clipping, FlatClipping, PerLayerClipping
from lightning_dp.clipping.bounds import Bound, QuantileBound
from lightning_dp.step.accumulator import Accumulator


def make_sum(clipping: Clipping | None = None, num_statistics: int = 0) -> Accumulator:
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8))
    return Accumulator(dict(module.named_parameters()), clipping or FlatClipping(2.0), num_statistics)


def joined(canaries: GradientCanaries, sums: Accumulator, q: float = 1.0, **options: Any) -> Tensor:
    """What one logical batch adds to the sum."""
    canaries.begin(q)
    sums.flat.zero_()
    canaries.join(0, sums, options.get("bound", Bound()), adds=options.get("adds", True))
    return sums.gradient.clone()


@pytest.mark.parametrize("clipping", [FlatClipping(2.0), AutomaticClipping(max_grad_norm=2.0), PerLayerClipping(2.0)])
def test_each_member_adds_what_clipping_lets_through_and_no_more(clipping: Clipping) -> None:
    """Every member in coordinates of its own: |sum|^2 = number in x S^2, and no coordinate above its group's bound."""
    canaries, sums = GradientCanaries(20), make_sum(clipping)
    added = joined(canaries, sums)
    groups = len(sums.groups)
    assert int((added != 0).sum()) == int(canaries.included.sum()) * groups
    assert float(added.norm()) == pytest.approx(2.0 * math.sqrt(canaries.included.sum()), rel=0.06)
    assert float(added.abs().max()) <= 2.0 / math.sqrt(groups)


def test_a_long_gradient_is_added_whole_where_nothing_clips() -> None:
    """The canaries' norm before clipping is what the argument says: a build that forgets to clip lets ten S through."""

    class Forgetful(FlatClipping):
        def _raw_factors(self, norms: Tensor) -> Tensor:
            return torch.ones_like(norms)

    added = joined(GradientCanaries(20), make_sum(Forgetful(2.0)))
    assert float(added.abs().max()) == pytest.approx(20.0)


def test_small_groups_and_too_many_canaries_are_refused() -> None:
    """Groups of 35 and 48 coordinates under per-layer clipping; all 83 in one under flat."""
    added = joined(GradientCanaries(40), make_sum(PerLayerClipping(2.0)))
    assert not added[:35].any()
    assert added[35:].any()
    with pytest.raises(ValueError, match="Expected num_canaries of at most 48"):
        joined(GradientCanaries(49), make_sum(PerLayerClipping(2.0)))
    assert joined(GradientCanaries(83), make_sum()).any()
    with pytest.raises(ValueError, match="Expected num_canaries of at most 83"):
        joined(GradientCanaries(84), make_sum())


@pytest.mark.parametrize("q", [0.1, 0.5])
def test_members_are_a_poisson_sample_of_those_that_are_in(q: float) -> None:
    """400 batches, 40 canaries in: frequency z < 5, false alarm 6e-7; 2/3 and 3/2 of q would be seen at z > 10."""
    canaries, sums = GradientCanaries(80), make_sum()
    drawn = torch.stack([joined(canaries, sums, q) != 0 for _ in range(400)]).double()
    total, expected = float(drawn.sum()), 400 * q * float(canaries.included.sum())
    assert abs(total - expected) < 5 * math.sqrt(expected * (1 - q))
    for wrong in (2 / 3, 3 / 2):
        assert abs(total - wrong * expected) > 5 * math.sqrt(wrong * expected * (1 - q))
    per_batch = drawn.sum(1)
    variance = float(canaries.included.sum()) * q * (1 - q)
    assert abs(float(per_batch.var()) - variance) < 6 * variance * math.sqrt(
        2 / 400
    )  # members independent of each other


def test_masked_coordinates_stay_empty() -> None:
    sums = make_sum()
    canaries = GradientCanaries(83)
    canaries.place(0, sums)
    mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in sums.parameters.items()}
    mask["1.weight"][:] = True
    sums.set_masks([mask], ("half",))
    added = joined(canaries, sums)
    assert added.shape == (40,)
    assert added.any()
    seen = sums.read(sums.gradient, torch.arange(83))
    assert torch.equal(seen[35:75], added)
    assert not seen[:35].any()
    assert not seen[75:].any()


def test_canaries_count_in_a_statistic_as_records_do() -> None:
    """Their norms are far above the bound: each member takes 1/2 off the centred count."""
    bound = QuantileBound(0.5, 0.2, None, None, None)
    sums, canaries = make_sum(num_statistics=1), GradientCanaries(20)
    bound.clipping(sums.base, 0, 1)
    joined(canaries, sums, bound=bound)
    assert float(sums.statistics) == pytest.approx(-0.5 * canaries.included.sum())


def test_one_process_of_several_adds() -> None:
    assert not joined(GradientCanaries(20), make_sum(), adds=False).any()


def test_the_score_is_the_likelihood_ratio_of_the_release() -> None:
    """Two releases at q = .3, written down by hand for every canary."""
    canaries, sums, q, std = GradientCanaries(20), make_sum(), 0.3, 1.7
    expected = np.zeros(20)
    for _ in range(2):
        clean = joined(canaries, sums, q)
        noisy = clean + std * torch.randn_like(clean)
        canaries.observe(0, sums, noisy, std)
        positions = canaries._places[0].of[0]
        shift = 2.0 * canaries.signs.numpy()
        seen = noisy[positions].double().numpy()
        ratio = np.exp(-((seen - shift) ** 2) / (2 * std**2) + seen**2 / (2 * std**2))
        expected += np.log(1 - q + q * ratio)
    np.testing.assert_allclose(canaries.scores, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(canaries.scores, canaries.scores)  # reading them changes nothing


def test_two_releases_on_one_batch_share_their_membership() -> None:
    """The ratios multiply inside the mixture, not outside."""
    canaries, sums, q = GradientCanaries(20), make_sum(), 0.3
    canaries.begin(q)
    total = np.zeros(20)
    for key in (0, 1):
        sums.flat.zero_()
        canaries.join(key, sums, Bound(), adds=True)
        noisy = sums.gradient + torch.randn_like(sums.gradient)
        positions = canaries._places[key].of[0]
        total += (2.0 * canaries.signs * noisy[positions] - 2.0).numpy()
        canaries.observe(key, sums, noisy, 1.0)
    np.testing.assert_allclose(canaries.scores, np.log(1 - q + q * np.exp(total)), rtol=1e-3, atol=1e-4)


def test_checkpoint_keeps_coins_and_scores_not_the_next_draw() -> None:
    canaries, sums = GradientCanaries(30), make_sum()
    joined(canaries, sums)
    canaries.observe(0, sums, sums.gradient.clone(), 1.0)
    again = GradientCanaries(2)
    again.load_state_dict(canaries.state_dict())
    np.testing.assert_array_equal(again.included, canaries.included)
    np.testing.assert_array_equal(again.scores, canaries.scores)
    again.place(0, sums)
    assert torch.equal(again._places[0].of[0], canaries._places[0].of[0])
    twice = [GradientCanaries(2) for _ in range(2)]
    for each in twice:
        each.load_state_dict(canaries.state_dict())
    draws = [torch.stack([joined(c, make_sum(), 0.5) for _ in range(4)]) for c in twice]
    assert not torch.equal(
        *draws
    )  # equal with probability 2^(-4 x number in): below 1e-9 unless fewer than 8 of 30 are
    with pytest.raises(PrivacyError, match="Expected sampling='poisson' with canaries in gradient space"):
        canaries.begin(None)


def test_no_canaries_do_nothing() -> None:
    canaries, sums = Canaries(), make_sum()
    before = sums.flat.clone()
    canaries.begin(None)
    canaries.join(0, sums, Bound(), adds=True)
    canaries.observe(0, sums, sums.gradient, 1.0)
    assert torch.equal(sums.flat, before)
