"""Data in a fixed order: cyclic batches, streams, and how a resumed run goes on."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, IterableDataset

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling import PrivateDataLoader, SamplingFacts, private_dataloader


def cyclic(size: int = 60, batch_size: int = 12, *, num_workers: int = 0, **options: Any) -> PrivateDataLoader:
    """60 records in 5 groups by default."""
    loader: Any = DataLoader(range(size), batch_size=batch_size, num_workers=num_workers)
    return private_dataloader(loader, sampling="cyclic", **options)


class Stream(IterableDataset[Any]):
    def __init__(self, size: int = 23) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        worker = torch.utils.data.get_worker_info()
        return iter(range(self.size)) if worker is None else iter(range(worker.id, self.size, worker.num_workers))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.size


def stream(dataset: Any = None, *, num_workers: int = 0, **options: Any) -> PrivateDataLoader:
    """23 records in batches of 3 by default: 8 batches, or 4 logical batches of two."""
    loader = DataLoader(SizedStream() if dataset is None else dataset, batch_size=3, num_workers=num_workers)
    return private_dataloader(loader, sampling="shuffle", **{"fixed_order": True, **options})


def batches(loader: Any) -> list[list[int]]:
    """Members of every item of one pass."""
    return [[value for _, batch in item.microbatches for value in batch.tolist()] for item in loader]


def draws(loader: Any) -> list[list[int]]:
    """What one pass of the sampler draws: the same as ``batches``, without reading it."""
    return list(loader.batch_sampler)


def joined(items: list[list[int]], accumulate: int) -> list[list[int]]:
    """Members of every logical batch, sorted."""
    return [sorted(itertools.chain(*items[first : first + accumulate])) for first in range(0, len(items), accumulate)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_record_comes_back_after_exactly_b_steps(world_size: int, accumulate: int) -> None:
    options = {"accumulate": accumulate, "world_size": world_size}
    loaders = [cyclic(120, 12 // world_size // accumulate, rank=rank, **options) for rank in range(world_size)]
    separation = loaders[0].facts.separation
    assert separation == 10
    assert len(loaders[0]) == 10 * accumulate
    for rank, loader in enumerate(loaders):
        passes = [joined(batches(loader), accumulate) for _ in range(3)]
        assert passes[0] == passes[1] == passes[2]
        assert sorted(itertools.chain(*passes[0])) == list(range(rank, 120, world_size))


def group_counts(num_loaders: int, **options: Any) -> np.ndarray[Any, Any]:
    """In how many of many assignments each of 20 records is in each of 4 groups."""
    counts = np.zeros((20, 4))
    for number in range(num_loaders):
        loader = cyclic(20, 5, **{key: value(number) if callable(value) else value for key, value in options.items()})
        for group, members in enumerate(draws(loader)):
            counts[members, group] += 1
    return counts


def groups_are_uniform(counts: np.ndarray[Any, Any], total: int) -> bool:
    """Chi-square over records and groups (df = 60); false-alarm rate 2e-7, two-sided: too even is wrong too."""
    statistic = ((counts - total / 4) ** 2).sum() / (total / 4)
    low, high = stats.chi2.ppf([1e-7, 1 - 1e-7], df=60)
    return bool(low < statistic < high)


@pytest.mark.parametrize("options", [{}, {"public_assignment": lambda number: number}], ids=["secret", "public"])
@pytest.mark.one_in(2)
def test_groups_are_uniform(options: dict[str, Any]) -> None:
    """400 assignments of 20 records to 4 groups."""
    counts = group_counts(400, **options)
    assert (counts.sum(1) == 400).all()
    assert groups_are_uniform(counts, 400)
    biased = counts.copy()
    biased[:, 0], biased[:, 1] = counts[:, 0] * 2 / 3, counts[:, 1] + counts[:, 0] / 3
    assert not groups_are_uniform(biased, 400)
    assert not groups_are_uniform(np.full((20, 4), 100.0), 400)


def test_groups_of_two_records_are_independent() -> None:
    """Records 0 and 1 meet in a quarter of 2,000 assignments to 4 groups: 5.3 sigma, false-alarm rate 1e-7."""
    together = sum(any({0, 1} <= set(members) for members in draws(cyclic(8, 2))) for _ in range(2000))
    bound = 5.3 * np.sqrt(2000 * 0.25 * 0.75)
    assert abs(together - 500) < bound
    for wrong in (2 / 3, 3 / 2):
        assert abs(together - 500 * wrong) > bound


def test_global_seeds_do_not_predict_groups() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        found.append(batches(cyclic()))
    assert found[0] != found[1]


def test_ranks_have_groups_of_their_own() -> None:
    """Group numbers of the 500 records of either rank: 5.3 sigma (false-alarm rate 1e-7); one stream for both gives
    1.
    """
    groups = np.zeros((2, 500))
    for rank in (0, 1):
        for group, members in enumerate(batches(cyclic(1000, 50, rank=rank, world_size=2, seed=4))):
            groups[rank, np.array(members, int) // 2] = group
    assert abs(np.corrcoef(groups)[0, 1]) < 5.3 / np.sqrt(500)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.one_in(2)
def test_a_pass_cut_short_goes_on_with_the_next_group(num_workers: int) -> None:
    """Whatever the workers have read ahead."""
    loader = cyclic(num_workers=num_workers, accumulate=2, seed=3)
    whole = joined(batches(cyclic(accumulate=2, seed=3)), 2)
    found = []
    for _ in range(4):
        items = list(itertools.islice(iter(loader), 4))  # two of three logical batches
        found += joined([[v for _, batch in item.microbatches for v in batch.tolist()] for item in items], 2)
    assert loader.position == 8
    assert found == [whole[step % len(whole)] for step in range(8)]


def test_a_public_assignment_is_the_same_for_every_process() -> None:
    """Resumed in mid-pass, and by another number of processes; each with random streams of its own."""
    whole = [sorted(members) for members in batches(cyclic(60, 12, public_assignment=9))]
    loader = cyclic(60, 12, public_assignment=9)
    loader.start_at(7)
    assert [sorted(members) for members in batches(loader)] == whole[2:] + whole[:2]
    halves = [batches(cyclic(60, 6, public_assignment=9, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [sorted(one + other) for one, other in zip(*halves, strict=True)] == whole
    assert [sorted(members) for members in batches(cyclic(60, 12, public_assignment=10))] != whole


def test_a_secret_assignment_cannot_go_on_in_mid_pass() -> None:
    loader = cyclic()
    with pytest.raises(PrivacyError, match=r"Step 7 is 2 steps into a pass of 5.*zero_out"):
        loader.start_at(7)
    loader.start_at(10)
    assert sorted(itertools.chain(*batches(loader))) == list(range(60))
    assert loader.position == 15
    with pytest.raises(PrivacyError, match=r"Step 9 is 4 steps into a pass"):
        loader.start_at(9)


def test_a_secret_assignment_goes_on_in_its_process() -> None:
    """A step that failed is taken again with its own group; one that this process has not reached is refused."""
    loader = cyclic()
    whole = batches(loader)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    assert loader.position == 8
    loader.start_at(7)
    assert batches(loader) == whole[2:] + whole[:2]
    with pytest.raises(PrivacyError, match="Step 13 is 3 steps into a pass"):
        loader.start_at(13)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_secret_assignment_is_never_copied(duplicate: Any) -> None:
    with pytest.raises(TypeError, match="secret assignment cannot be copied or pickled"):
        duplicate(cyclic().batch_sampler)


@pytest.mark.parametrize("options", [{"seed": 2}, {"public_assignment": 2}], ids=str)
def test_a_known_assignment_is_kept_by_a_copy(options: dict[str, Any]) -> None:
    sampler: Any = cyclic(**options).batch_sampler
    again = pickle.loads(pickle.dumps(sampler))
    assert [sorted(members) for members in again] == [sorted(members) for members in sampler]


def test_checkpoints_hold_nothing_of_the_order() -> None:
    loader = cyclic()
    batches(loader)
    assert loader.state_dict() == {}


def test_facts_of_cyclic() -> None:
    secret = cyclic(1000, 10, accumulate=4, world_size=2, rank=1).facts
    expected = {"accumulate": 4, "separation": 12, "fixed_order": True}
    assert secret == SamplingFacts("cyclic", 1000, 80, None, 12, **expected)
    public = cyclic(1000, 10, accumulate=4, world_size=2, public_assignment=0).facts
    assert public == SamplingFacts("cyclic", 1000, 80, None, 12, add_remove_changes_one_batch=False, **expected)


def test_facts_of_a_stream_in_a_fixed_order() -> None:
    facts = stream(accumulate=2).facts
    expected = {"add_remove_changes_one_batch": False, "accumulate": 2, "order": (3, 0, 1)}
    assert facts == SamplingFacts("shuffle", 23, 6, None, 4, separation=4, fixed_order=True, **expected)
    assert stream(fixed_order=False).facts.separation is None
    assert stream(Stream()).facts.separation is None


def test_passes_are_the_uses_of_a_record() -> None:
    facts = cyclic().facts
    assert [facts.passes(steps) for steps in (1, 5, 6, 50)] == [1, 1, 2, 10]
    assert stream().facts.passes(17) == 3
    once = stream(fixed_order=False).facts
    assert once.passes(8) == 1
    with pytest.raises(ValueError, match=r"fixed_order=True and a stream with a length for 9 steps"):
        once.passes(9)
    with pytest.raises(ValueError, match=r"got fixed_order=True and None steps in a pass"):
        stream(Stream()).facts.passes(1)
    for sampling in ("poisson", "shuffle"):
        facts = private_dataloader(DataLoader(range(20), batch_size=4), sampling=sampling).facts
        with pytest.raises(ValueError, match=f'got sampling="{sampling}" over data with random access'):
            facts.passes(5)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dataset", [SizedStream(), Stream()], ids=["sized", "unsized"])
@pytest.mark.one_in(2)
def test_a_stream_is_read_up_to_where_it_stopped(dataset: Any, num_workers: int) -> None:
    options = {"num_workers": num_workers, "accumulate": 2}
    whole = batches(stream(dataset, **options))
    loader = stream(dataset, **options)
    loader.start_at(3)
    assert batches(loader) == whole[6:]
    assert loader.position == -(-len(whole) // 2)
    assert batches(loader) == whole


def test_a_resumed_stream_knows_its_passes() -> None:
    whole = batches(stream())
    loader = stream()
    loader.start_at(19)  # 8 batches a pass
    assert batches(loader) == whole[3:]
    loader.start_at(19, steps_per_pass=5)  # cut short on purpose
    assert batches(loader) == whole[4:]
    loader.start_at(16)
    assert batches(loader) == whole


def test_a_stream_that_ends_too_soon_is_refused() -> None:
    loader = stream(Stream())
    loader.start_at(9)
    with pytest.raises(PrivacyError, match="The stream ended before item 9"):
        next(iter(loader))


def test_a_stream_without_a_promise_cannot_go_on() -> None:
    loader = stream(fixed_order=False)
    loader.start_at(0)
    batches(loader)
    for step in (5, 8):
        with pytest.raises(PrivacyError, match=f"The stream begins with its first record, but {step} steps"):
            loader.start_at(step)


@pytest.mark.parametrize("sampling", ["poisson", "shuffle"])
def test_random_batches_have_no_position(sampling: str) -> None:
    loader = private_dataloader(DataLoader(range(20), batch_size=4), sampling=sampling, seed=1)
    other = private_dataloader(DataLoader(range(20), batch_size=4), sampling=sampling, seed=1)
    loader.start_at(7)
    assert batches(loader) == batches(other)


@pytest.mark.parametrize("step", [-1, 1.0, True])
def test_steps_out_of_range_are_refused(step: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="step"):
        cyclic().start_at(step)
