"""Random streams of the user's code while data is read: fresh for every item, undisturbed around it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_dp.sampling import fresh_randomness, private_dataloader

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def coins() -> tuple[float, float, float]:
    """One draw of each global generator."""
    return torch.rand(1, dtype=torch.float64).item(), np.random.random(), random.random()  # noqa: NPY002


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), str(numpy_state[1].tolist()), numpy_state[2:]


class Augmented(Dataset[Any]):
    """Each sample is (index, its coins); it burns ``burnt`` coins more."""

    def __init__(self, size: int = 40, burnt: int = 0) -> None:
        self.size, self.burnt = size, burnt

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, tuple[float, float, float]]:
        sample = (index, coins())
        for _ in range(self.burnt):
            coins()
        return sample


class AugmentedMany(Augmented):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class AugmentedStream(IterableDataset[Any]):
    """The same samples in order; two workers take turns record by record."""

    def __init__(self, size: int = 40, burnt: int = 0) -> None:
        self.records = Augmented(size, burnt)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self.records[index] for index in range(first, self.records.size, step))


KINDS: dict[str, type[Any]] = {"records": Augmented, "many": AugmentedMany, "stream": AugmentedStream}


def make(kind: str, *, num_workers: int = 0, burnt: int = 0, **options: Any) -> Any:
    sampling = "shuffle" if kind == "stream" else "poisson"
    loader = DataLoader(KINDS[kind](burnt=burnt), batch_size=8, collate_fn=list, num_workers=num_workers)
    return private_dataloader(loader, sampling=sampling, **options)


def items(loader: Any) -> list[list[tuple[int, tuple[float, float, float]]]]:
    """The samples of every item of one pass."""
    return [[sample for _, part in item.microbatches for sample in part] for item in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.one_in(2)
def test_global_seeds_do_not_predict_augmentation(kind: str, num_workers: int) -> None:
    seen: list[float] = []
    for _ in range(2):
        seed_everything(0)
        seen += [coin for item in items(make(kind, num_workers=num_workers)) for _, drawn in item for coin in drawn]
    assert len(seen) > 100
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.one_in(2)
def test_augmentation_does_not_depend_on_earlier_draws(kind: str, num_workers: int) -> None:
    """Samples that use up more randomness change nothing in the next item; so the number of samples does not either."""
    runs = []
    for burnt in (0, 3):
        seed_everything(0)
        runs.append(items(make(kind, num_workers=num_workers, burnt=burnt, seed=5)))
    firsts = [[item[0] for item in run if item] for run in runs]
    assert len(firsts[0]) >= 4
    assert firsts[0] == firsts[1]
    seconds = [[item[1] for item in run if len(item) > 1] for run in runs]
    assert seconds[0] != seconds[1]


@pytest.mark.parametrize("kind", ["records", "many"])
def test_augmentation_follows_from_the_seed_of_a_test(kind: str) -> None:
    """Whatever the number of workers, and another one in the next pass."""
    alone, workers = make(kind, seed=5), make(kind, num_workers=2, seed=5)
    passes = [(items(alone), items(workers)) for _ in range(2)]
    assert all(one == other for one, other in passes)
    drawn = [{coins for item in one for _, coins in item} for one, _ in passes]
    assert not drawn[0] & drawn[1]
    assert items(make(kind, seed=6)) != passes[0][0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.one_in(2)
def test_augmentation_of_a_stream_follows_from_the_seed(num_workers: int) -> None:
    options = {"num_workers": num_workers, "seed": 5}
    one, other = make("stream", **options), make("stream", **options)
    passes = [items(one) for _ in range(2)]
    assert [items(other) for _ in range(2)] == passes
    drawn = [coins for items_ in passes for item in items_ for _, coins in item]
    assert len(set(drawn)) == len(drawn) == 80
    assert items(make("stream", rank=1, world_size=2, **options)) != passes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_this_process_are_not_disturbed(kind: str) -> None:
    """Nor between two items, where the step runs, nor at the end of the data."""
    seed_everything(3)
    iterator = iter(make(kind, microbatch_size=3))
    next(iterator)
    before = states()
    assert [states() == before for _ in iterator] == [True] * 4
    assert states() == before


class Broken(Augmented):
    def __getitem__(self, index: int) -> Any:
        coins()
        raise OSError("unreadable")


class BrokenStream(AugmentedStream):
    def __iter__(self) -> Iterator[Any]:
        yield self.records[0]
        coins()
        raise OSError("unreadable")


def broken_collate(samples: list[Any]) -> Any:
    coins()
    raise OSError("unreadable")


@pytest.mark.parametrize(
    ("dataset", "collate_fn"),
    [(Broken(), list), (BrokenStream(), list), (Augmented(), broken_collate), (AugmentedStream(), broken_collate)],
    ids=["records", "stream", "collate", "stream-collate"],
)
def test_streams_are_put_back_when_reading_fails(dataset: Any, collate_fn: Any) -> None:
    """The loader has a generator of its own for its workers' seed: torch draws that when an iterator begins."""
    loader = DataLoader(dataset, batch_size=20, collate_fn=collate_fn, generator=torch.Generator())
    sampling = "shuffle" if isinstance(dataset, IterableDataset) else "poisson"
    before = states()
    with pytest.raises(OSError, match="unreadable"):
        next(iter(private_dataloader(loader, sampling=sampling)))
    assert states() == before


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_shorter_last_item_of_a_stream_is_fresh_too(drop_last: bool) -> None:
    loader = DataLoader(AugmentedStream(10), batch_size=4, collate_fn=with_coin, drop_last=drop_last)
    private = private_dataloader(loader, sampling="shuffle")
    iterator = iter(private)
    batches = [batch for _, batch in next(iterator).microbatches]
    before = states()
    batches += [batch for item in iterator for _, batch in item.microbatches]
    assert states() == before
    assert [len(samples) for samples, _ in batches] == ([4, 4] if drop_last else [4, 4, 2])
    drawn = [coin for samples, coin in batches] + [drawn for samples, _ in batches for _, drawn in samples]
    assert len(set(drawn)) == len(drawn)


def with_coin(samples: list[Any]) -> tuple[list[Any], tuple[float, float, float]]:
    return samples, coins()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.one_in(2)
def test_collate_functions_draw_from_the_same_streams(kind: str, num_workers: int) -> None:
    """They follow the samples of their item, and no global seed."""
    seen = []
    for _ in range(2):
        seed_everything(0)
        loader = DataLoader(KINDS[kind](), batch_size=8, collate_fn=with_coin, num_workers=num_workers)
        private = private_dataloader(loader, sampling="shuffle" if kind == "stream" else "poisson")
        seen += [coin for item in private for _, (_, coin) in item.microbatches]
    assert len(set(seen)) == len(seen) > 6


def test_fresh_randomness_is_that_of_its_entropy() -> None:
    seed_everything(0)
    before, drawn = states(), []
    for entropy in (1, 2, 1, 2**127 + 1):
        with fresh_randomness(entropy):
            drawn.append((*coins(), *coins()))
        assert states() == before
    assert drawn[0] == drawn[2]
    different = [coin for each in (drawn[0], drawn[1], drawn[3]) for coin in each]
    assert len(set(different)) == len(different)


def test_fresh_randomness_nests_and_ends_with_an_error() -> None:
    seed_everything(0)
    before = states()
    with fresh_randomness(1):
        expected = (coins(), coins())
    with fresh_randomness(1):
        assert coins() == expected[0]
        with pytest.raises(OSError, match="unreadable"), fresh_randomness(2):
            broken_collate([])
        assert coins() == expected[1]
    assert states() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fresh_randomness_covers_the_cuda_device() -> None:
    torch.cuda.manual_seed(0)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(0)
    drawn = []
    for entropy in (1, 2, 1):
        with fresh_randomness(entropy):
            drawn.append(torch.rand(3, device="cuda"))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.rand(3, device="cuda"), expected)
