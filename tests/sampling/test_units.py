"""Users with several records: who joins, with which records, and in which microbatch."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from lightning_dp.sampling import PrivateDataLoader, SamplingFacts, private_dataloader
from lightning_dp.sampling.batches import MicrobatchCollate
from tests.sampling.test_indices import frequencies_are_right, variance_is_right

SAMPLINGS = ("poisson", "shuffle", "cyclic")
OWNED = [1, 5, 2, 3, 9, 1, 4, 2, 6, 3]  # records of users 0, 1, ...
IDS = [user for round_ in range(9) for user in range(10) if OWNED[user] > round_]  # dealt out in turns: 36 records


def users(
    ids: Sequence[Any] | Any = IDS, batch_size: int = 3, most: int = 2, *, num_workers: int = 0, **options: Any
) -> PrivateDataLoader:
    """A loader over records that are their own indices."""
    loader: Any = DataLoader(range(len(ids)), batch_size=batch_size, num_workers=num_workers)
    return private_dataloader(loader, unit=ids, records_per_unit=most, **options)


def drawn_users(num_steps: int, **options: Any) -> list[list[int]]:
    """Users of each item, one entry per record, for so many items."""
    sampler: Any = users(**options).batch_sampler
    found: list[list[int]] = []
    while len(found) < num_steps:
        found.extend([IDS[record] for record in draw] for draw in sampler)
    return found[:num_steps]


def test_every_user_joins_with_probability_q() -> None:
    """8,000 logical batches of 10 users at q = 0.3, whatever the number of their records."""
    batches = [list(dict.fromkeys(batch)) for batch in drawn_users(8000)]
    assert frequencies_are_right(batches, 10, 0.3)
    for wrong in (2 / 3, 3 / 2):
        assert not frequencies_are_right(batches, 10, 0.3 * wrong)
    by_records = [[user for user in IDS if np.random.default_rng(step).random() < 0.3] for step in range(100)]
    assert not frequencies_are_right(by_records, 10, 0.3)


def test_users_join_independently() -> None:
    """P(i and j) = q^2 for all 45 pairs, 8,000 batches, 5.9 sigma; their number has the binomial's variance, 10 x .3 x
    .7.
    """
    joined = np.zeros((8000, 10))
    for row, batch in zip(joined, drawn_users(8000), strict=True):
        row[batch] = 1
    both = (joined.T @ joined)[np.triu_indices(10, 1)] / len(joined)
    bound = 5.9 * math.sqrt(0.09 * 0.91 / len(joined))
    assert np.abs(both - 0.09).max() < bound
    for wrong in (2 / 3, 3 / 2):
        assert np.abs(both - 0.09 * wrong).max() > bound
        assert not variance_is_right(joined.sum(1), 2.1 * wrong)
    assert variance_is_right(joined.sum(1), 2.1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("most", [1, 2, 100])
def test_a_user_brings_at_most_its_records(sampling: str, most: int) -> None:
    loader = users(most=most, sampling=sampling)
    for _ in range(20):
        for draw in loader.batch_sampler:
            assert len(set(draw)) == len(draw)
            counts = Counter(IDS[record] for record in draw)
            assert all(count == min(most, OWNED[user]) for user, count in counts.items())


def pairs_are_uniform(counts: Counter[tuple[int, ...]], num_pairs: int) -> bool:
    """Chi-square over all pairs of records (df = pairs - 1); false-alarm rate 2e-7, two-sided."""
    expected = sum(counts.values()) / num_pairs
    statistic = sum((count - expected) ** 2 for count in counts.values()) / expected
    statistic += expected * (num_pairs - len(counts))
    low, high = stats.chi2.ppf([1e-7, 1 - 1e-7], df=num_pairs - 1)
    return bool(low < statistic < high)


def test_records_are_a_uniform_subset_without_replacement() -> None:
    """User 1 has 5 records, 10 pairs of them; about 5,400 draws. Neighbours only, or weights of 2/3 and 3/2, are
    rejected.
    """
    own = [record for record, user in enumerate(IDS) if user == 1]
    sampler: Any = users().batch_sampler
    counts: Counter[tuple[int, ...]] = Counter()
    for draw in itertools.chain.from_iterable(sampler for _ in range(6000)):
        if chosen := tuple(record for record in draw if record in own):
            counts[chosen] += 1
    assert set(counts) == set(itertools.combinations(own, 2))
    assert pairs_are_uniform(counts, 10)
    for wrong in (2 / 3, 3 / 2):
        skewed = Counter({pair: round(n * (wrong if own[0] in pair else 1)) for pair, n in counts.items()})
        assert not pairs_are_uniform(skewed, 10)
    assert not pairs_are_uniform(Counter({pair: counts[pair] for pair in itertools.pairwise(own)}), 10)


def test_records_are_chosen_again_every_time() -> None:
    chosen = {tuple(draw) for _ in range(30) for draw in users([0] * 8, 1, most=2).batch_sampler}
    assert len(chosen) > 10


def everything(loader: PrivateDataLoader) -> list[list[tuple[int, Any]]]:
    return [[(count, batch.tolist()) for count, batch in item.microbatches] for _ in range(2) for item in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.one_in(4)
def test_one_record_per_user_is_the_record_level(sampling: str, num_workers: int) -> None:
    """Bit for bit under one seed: members, their order, parts and microbatches."""
    options: dict[str, Any] = {"sampling": sampling, "seed": 3, "accumulate": 2, "microbatch_size": 3}
    dataset = torch.arange(50)
    plain: Any = DataLoader(dataset, batch_size=7, num_workers=num_workers)  # type: ignore[arg-type]
    ids = [f"user {number * 7 % 50}" for number in range(50)]
    found = private_dataloader(plain, unit=ids, records_per_unit=1, **options)
    records = private_dataloader(plain, **options)
    assert everything(found) == everything(records)
    assert found.facts.sample_rate == records.facts.sample_rate


@pytest.mark.parametrize(("microbatch_size", "num_workers"), [(None, 0), (1, 0), (3, 0), (4, 0), (3, 2)])
@pytest.mark.one_in(4)
def test_users_are_never_split(microbatch_size: int | None, num_workers: int) -> None:
    """Owners say whose each record is; a microbatch holds at most its records, or one user."""
    loader = users(most=4, batch_size=5, microbatch_size=microbatch_size, num_workers=num_workers, accumulate=2)
    seen = 0
    for item in itertools.chain.from_iterable(loader for _ in range(5)):
        everyone: list[int] = []
        assert len(item.owners) == len(item)
        for (count, batch), owners in zip(item.microbatches, item.owners, strict=True):
            assert owners is not None
            assert owners.dtype == torch.int64
            whose = [IDS[record] for record in batch.tolist()]
            present = list(dict.fromkeys(whose))
            assert [present[owner] for owner in owners.tolist()] == whose
            assert sorted(set(owners.tolist())) == list(range(count))
            assert owners.tolist() == sorted(owners.tolist())
            assert microbatch_size is None or len(batch) <= microbatch_size or count == 1
            everyone += present
        assert len(set(everyone)) == len(everyone) == item.num_samples
        seen += len(everyone)
    assert seen > 30


def test_microbatches_take_whole_users_while_they_fit() -> None:
    collate = MicrobatchCollate(tuple, 4)
    item = collate(list(range(13)), [1, 2, 1, 5, 3, 1])
    assert item.microbatches == [(3, (0, 1, 2, 3)), (1, (4, 5, 6, 7, 8)), (2, (9, 10, 11, 12))]
    assert [None if owner is None else owner.tolist() for owner in item.owners] == [[0, 1, 1, 2], [0] * 5, [0, 0, 0, 1]]
    assert collate([], []).microbatches == []
    assert MicrobatchCollate(tuple, None)([7, 8, 9], [2, 1]).microbatches == [(2, (7, 8, 9))]


def test_records_have_no_owners() -> None:
    item = MicrobatchCollate(tuple, 2)([7, 8, 9])
    assert item.owners == [None, None]
    assert [count for count, _ in item.microbatches] == [1, 2]


def test_owners_are_pinned_with_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_dp.sampling import batches

    pinned: list[Any] = []
    monkeypatch.setattr(batches, "_pin", lambda value: (pinned.append(value), value)[1])
    item = MicrobatchCollate(tuple, None)([7, 8, 9], [2, 1]).pin_memory()
    assert item.microbatches == [(2, (7, 8, 9))]
    assert item.owners[0] is not None
    assert item.owners[0].tolist() == [0, 0, 1]
    assert any(value is item.owners[0] for each in pinned if isinstance(each, list) for value in each)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_users_are_dealt_to_ranks(sampling: str) -> None:
    """No user is on two ranks, and together they are all users."""
    seen: list[set[int]] = []
    for rank in range(3):
        loader = users(batch_size=1, rank=rank, world_size=3, sampling=sampling)
        found = {IDS[record] for _ in range(60) for draw in loader.batch_sampler for record in draw}
        assert found == set(range(rank, 10, 3))
        seen.append(found)
    assert sum(map(len, seen)) == 10


def test_facts_of_users() -> None:
    loader = users(batch_size=2, most=4, accumulate=2, num_batches_kept=None)
    assert loader.facts == SamplingFacts("poisson", 10, 4, 0.4, 2, accumulate=2, unit="user", records_per_unit=4)
    kept = users(batch_size=2, num_batches_kept=3)
    assert (kept.facts.dataset_size, kept.facts.sample_rate) == (6, 1 / 3)
    assert {IDS[record] for _ in range(30) for draw in kept.batch_sampler for record in draw} == set(range(6))


def test_extra_records_are_users_of_their_own() -> None:
    loader = private_dataloader(
        DataLoader(range(4), batch_size=6), unit=[5, 5, 5, 5], records_per_unit=3, extra_records=[7] * 5
    )
    assert (loader.facts.dataset_size, loader.facts.expected_batch_size) == (6, 6)
    draws: Any = next(iter(loader.batch_sampler))
    assert sorted(draws.sizes) == [1, 1, 1, 1, 1, 3]
    assert {4, 5, 6, 7, 8} <= set(draws)
