"""TopAgg: where a sample votes, how large its vote is, its coins, and what the noisy sum becomes."""

from __future__ import annotations

import copy
import math
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dp.clipping import TopAgg, top_agg
from lightning_dp.clipping.votes import coin_generator
from tests.cases import each

KINDS = [
    TopAgg(3),
    TopAgg(3, sign="plain"),
    TopAgg(3, vote_threshold=0.1),
    TopAgg(3, keep_values=True, max_grad_norm=0.5),
]
COORDINATE = st.one_of(
    st.sampled_from([0.0, 1e-45, -1e-38, 1.0, -1.0, 3e38, -3.4e38, math.inf, -math.inf, math.nan]),
    st.floats(width=32, allow_nan=False),
)


def gradients(num_samples: int, num_coordinates: int, seed: int = 0) -> Tensor:
    return torch.randn(num_samples, num_coordinates, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clipping", KINDS, ids=str)
@settings(max_examples=100, deadline=None)
@given(row=st.lists(COORDINATE, min_size=6, max_size=6), live=st.lists(st.booleans(), min_size=6, max_size=6))
@pytest.mark.one_in(2)
def test_contribution_is_bounded_and_stays_on_live_coordinates(
    clipping: TopAgg, row: list[float], live: list[bool]
) -> None:
    grads_BP, mask = torch.tensor([row]), torch.tensor(live)
    for added, allowed in (
        (clipping.contributions(grads_BP), torch.ones(6, dtype=torch.bool)),
        (clipping.contributions(grads_BP, mask), mask),
    ):
        assert float(added.double().norm()) <= clipping.sensitivity(1) * (1 + 1e-15)
        assert bool((added[:, ~allowed] == 0).all())
        assert int((added != 0).sum()) <= min(3, int(allowed.sum()))
        if not all(map(math.isfinite, row)):
            assert bool((added == 0).all())


@each("sign", ["stochastic", "plain"])
@each("k", [1, 7, 50])
@each("dtype", [torch.float32, torch.float64])
def test_vote_has_norm_sqrt_k(sign: str, k: int, dtype: torch.dtype) -> None:
    clipping = TopAgg(k, sign=sign)
    added = clipping.contributions(gradients(20, 50).to(dtype))
    assert added.dtype == dtype
    assert bool((added.square().sum(1) == k).all())  # exactly: squares of signs
    assert clipping.sensitivity(1) == math.sqrt(k)


@pytest.mark.parametrize("clipping", [kind for kind in KINDS if kind.sign == "plain" or kind.keep_values], ids=str)
def test_what_a_sample_chooses_does_not_depend_on_the_others(clipping: TopAgg) -> None:
    """So nothing is ever chosen by the un-noised sum of a batch."""
    grads_BP = gradients(12, 9)
    for live in (None, torch.arange(9) % 2 == 0):
        together = clipping.contributions(grads_BP, live)
        for i in range(12):
            among_others = torch.cat([grads_BP[i : i + 1], 1e3 * gradients(5, 9, seed=1)])
            assert torch.equal(clipping.contributions(among_others, live)[0], together[i])


def test_stochastic_vote_of_few_coordinates_has_norm_sqrt_k() -> None:
    one = torch.tensor([[0.0, 0.0, -2.0, 0.0, 0.0]])
    assert float(TopAgg(4).contributions(one).norm()) == 2.0
    assert TopAgg(4, sign="plain").contributions(one).tolist() == [[0.0, 0.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize("clipping", KINDS, ids=str)
def test_samples_choose_their_largest_coordinates(clipping: TopAgg) -> None:
    grads_BP = gradients(40, 9, seed=1)
    for gradient, added in zip(grads_BP, clipping.contributions(grads_BP), strict=True):
        largest = sorted(range(9), key=lambda j: -abs(float(gradient[j])))[:3]
        assert sorted(added.nonzero().squeeze(1).tolist()) == sorted(largest)


def test_plain_votes_carry_the_signs() -> None:
    grads_BP = gradients(40, 9, seed=1)
    added = TopAgg(9, sign="plain").contributions(grads_BP)
    assert torch.equal(added, grads_BP.sign())


def test_kept_values_are_clipped_only_beyond_the_bound() -> None:
    grads_BP = torch.tensor([[0.1, -0.3, 0.4], [1.0, -3.0, 4.0]])
    added = TopAgg(2, keep_values=True).contributions(grads_BP)
    torch.testing.assert_close(added, torch.tensor([[0.0, -0.3, 0.4], [0.0, -0.6, 0.8]]), rtol=1e-6, atol=0)
    assert TopAgg(2, keep_values=True, max_grad_norm=0.3).sensitivity(1) == 0.3


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2])
def test_stochastic_sign_is_unbiased(wrong: float) -> None:
    """E v = g / b. 40,000 samples, 4 coordinates, 5 standard errors: false alarm below 3e-6; other scales are
    refused.
    """
    gradient = torch.tensor([0.5, -0.25, 1.0, 0.1])
    mean = TopAgg(4).contributions(gradient.expand(40_000, 4)).mean(0)
    expected = (gradient * wrong).clamp(-1, 1)
    error = ((1 - gradient**2) / 40_000).sqrt()
    assert bool(((mean - expected).abs() <= 5 * error + 1e-6).all()) == (wrong == 1.0)


def test_coins_come_from_no_generator_of_the_user() -> None:
    undecided = torch.full((1, 2000), 1e-3).index_fill(1, torch.tensor([0]), 1.0)
    before, votes = torch.manual_seed(7).get_state(), []
    for _ in range(2):
        torch.manual_seed(7)
        votes.append(TopAgg(2000).contributions(undecided))
        assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(*votes)  # alike by chance: 2^-1999


def test_coins_of_a_forked_process_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    parent = coin_generator(cpu)
    assert coin_generator(cpu) is parent
    monkeypatch.setattr(os, "getpid", lambda: -1)
    child = coin_generator(cpu)
    assert child is not parent
    assert child.initial_seed() != parent.initial_seed()


@pytest.mark.parametrize("clipping", KINDS, ids=str)
def test_broken_or_zero_samples_add_nothing(clipping: TopAgg) -> None:
    grads_BP = gradients(6, 5)
    grads_BP[1, 0], grads_BP[2, 4], grads_BP[3, 2], grads_BP[4] = math.nan, math.inf, -math.inf, 0.0
    for live in (None, torch.tensor([False, True, True, True, False])):
        added = clipping.contributions(grads_BP, live)
        assert bool((added[1:5] == 0).all())
        assert bool((added[[0, 5]] != 0).sum(1).eq(3).all())


@pytest.mark.parametrize("clipping", KINDS, ids=str)
def test_masked_coordinates_receive_no_vote(clipping: TopAgg) -> None:
    """Stochastic signs would land on zeros: fewer than k coordinates of a masked gradient are not zero."""
    live = torch.tensor([True, False, False, True, False, False])
    grads_BP = gradients(30, 6) * live
    added = clipping.contributions(grads_BP, live)
    assert bool((added[:, ~live] == 0).all())
    assert bool((added[:, live] != 0).all())
    assert bool((clipping.contributions(grads_BP, torch.zeros(6, dtype=torch.bool)) == 0).all())


def test_live_coordinates_are_chosen_as_if_they_were_alone() -> None:
    live = torch.tensor([True, True, False, True, False, True, True])
    grads_BP, clipping = gradients(30, 7), TopAgg(3, sign="plain")
    expected = torch.zeros(30, 7)
    expected[:, live] = clipping.contributions(grads_BP[:, live])
    assert torch.equal(clipping.contributions(grads_BP, live), expected)


def test_rows_in_chunks_are_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grads_BP = gradients(11, 7)
    live = torch.tensor([True] * 5 + [False] * 2)
    clipping = TopAgg(3, sign="plain")
    whole = clipping.contributions(grads_BP), clipping.contributions(grads_BP, live)
    monkeypatch.setattr(top_agg, "_CHUNK", 14)
    assert torch.equal(clipping.contributions(grads_BP), whole[0])
    assert torch.equal(clipping.contributions(grads_BP, live), whole[1])


@pytest.mark.parametrize("clipping", KINDS, ids=str)
def test_empty_microbatch(clipping: TopAgg) -> None:
    assert clipping.contributions(torch.zeros(0, 5)).shape == (0, 5)
    assert clipping.contributions(torch.zeros(0, 5), torch.tensor([True] * 4 + [False])).shape == (0, 5)


def test_finish_divides_by_batch_and_root_of_k() -> None:
    noisy = torch.tensor([10.0, -4.0, 0.5])
    for clipping, expected in (
        (TopAgg(4), [0.5, -0.2, 0.025]),
        (TopAgg(4, vote_threshold=0.4), [0.5, 0.0, 0.0]),
        (TopAgg(4, vote_threshold=0.39), [0.5, -0.5, 0.0]),
        (TopAgg(4, vote_threshold=0.0), [0.5, -0.5, 0.5]),
        (TopAgg(4, keep_values=True, max_grad_norm=3.0), [1.0, -0.4, 0.05]),
    ):
        for out in (torch.full((3,), math.nan), noisy.clone()):
            clipping.finish(noisy if out[0].isnan() else out, 10, out)
            torch.testing.assert_close(out, torch.tensor(expected), rtol=1e-6, atol=0)


def test_unanimous_votes_do_not_depend_on_the_threshold() -> None:
    sums = TopAgg(4, sign="plain").contributions(gradients(1, 9).expand(10, 9)).sum(0)
    plain, thresholded = torch.empty(9), torch.empty(9)
    TopAgg(4).finish(sums, 10, plain)
    TopAgg(4, vote_threshold=0.5).finish(sums, 10, thresholded)
    torch.testing.assert_close(plain, thresholded, rtol=1e-6, atol=0)
    assert float(plain.norm()) == pytest.approx(1.0)


def test_fraction_is_settled_by_the_number_of_coordinates() -> None:
    assert TopAgg(0.29).for_coordinates(100) == TopAgg(29)
    assert TopAgg(1e-9, sign="plain").for_coordinates(100) == TopAgg(1, sign="plain")
    assert TopAgg(1.0).for_coordinates(100).k == 100
    assert TopAgg(1).for_coordinates(100).k == 1
    assert isinstance(TopAgg(1.0).for_coordinates(100).k, int)
    unsettled = TopAgg(0.5)
    for use in (
        lambda: unsettled.sensitivity(1),
        lambda: unsettled.contributions(torch.ones(2, 4)),
        lambda: unsettled.finish(torch.ones(4), 2, torch.empty(4)),
        lambda: TopAgg(0.5, keep_values=True).sensitivity(1),
    ):
        with pytest.raises(ValueError, match=r"got the fraction k=0.5.*for_coordinates"):
            use()


def test_copies_are_equal() -> None:
    for clipping in KINDS:
        for twin in (pickle.loads(pickle.dumps(clipping)), copy.deepcopy(clipping)):
            assert twin == clipping
            assert repr(twin) == repr(clipping)


@pytest.mark.parametrize("k", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_fraction_out_of_range_is_refused(k: float) -> None:
    with pytest.raises(ValueError, match=rf"float k in \(0, 1\], got k={k}"):
        TopAgg(k)


def test_counts_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="k >= 1, got k=0"):
        TopAgg(0)
    for k in (True, "3"):
        with pytest.raises(TypeError, match="k to be a whole number"):
            TopAgg(k)  # type: ignore[arg-type]
    for use in (
        lambda: TopAgg(6).for_coordinates(5),
        lambda: TopAgg(6).contributions(torch.ones(2, 5)),
        lambda: TopAgg(6).contributions(torch.ones(2, 5), torch.ones(5, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="k <= 5, the number of private coordinates, got k=6"):
            use()
    with pytest.raises(ValueError, match="Expected 1 group"):
        TopAgg(3).sensitivity(2)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="sign to be one of 'stochastic', 'plain'"):
        TopAgg(3, sign="sign")
    with pytest.raises(TypeError, match="keep_values to be True or False"):
        TopAgg(3, keep_values=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vote_threshold < inf"):
        TopAgg(3, vote_threshold=math.nan)
    with pytest.raises(ValueError, match=r"keep_values=True, got vote_threshold=0\.5"):
        TopAgg(3, keep_values=True, vote_threshold=0.5)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match=r"float32 or float64 gradients, got dtype=torch\.bfloat16"):
        TopAgg(3).contributions(torch.ones(2, 5, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"shape \(samples, coordinates\)"):
        TopAgg(3).contributions(torch.ones(5))
    for live in (torch.ones(4, dtype=torch.bool), torch.ones(5)):
        with pytest.raises(ValueError, match="active as 5 booleans"):
            TopAgg(3).contributions(torch.ones(2, 5), live)
