"""Private sampling: which loaders and options are accepted, and which are refused with a reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_dp.sampling import private_dataloader
from tests.cases import each

SAMPLINGS = ("poisson", "shuffle", "cyclic")


class Records(Dataset[Any]):
    """Record i is {"x": tensor(i), "name": str(i)}."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor(index), "name": str(index)}


class Stream(IterableDataset[Any]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


class DistributedSamplerWrapper(DistributedSampler[Any]):
    """Stands for Lightning's wrapper: the user's sampler sits inside its ``dataset``."""

    def __init__(self, sampler: Any, size: int) -> None:
        inner = Stand(sampler, size)
        super().__init__(inner, num_replicas=2, rank=0)


class Stand(Dataset[Any]):
    def __init__(self, sampler: Any, size: int) -> None:
        self._sampler = sampler
        self.size = size

    def __len__(self) -> int:
        return self.size


class OwnSampler(SequentialSampler):
    pass


DATA = Records(20)


@each(
    "loader",
    [
        DataLoader(DATA, batch_size=5),
        DataLoader(DATA, batch_size=5, shuffle=True),
        DataLoader(DATA, batch_size=5, sampler=DistributedSampler(DATA, num_replicas=2, rank=1)),
        DataLoader(DATA, batch_size=5, sampler=DistributedSamplerWrapper(RandomSampler(DATA), 20)),
        DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 5, drop_last=True)),
    ],
)
@each("sampling", SAMPLINGS)
def test_ordinary_loaders_are_accepted(loader: DataLoader[Any], sampling: str) -> None:
    assert private_dataloader(loader, sampling=sampling).facts.expected_batch_size == 5


class OwnIteration(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([1])


class NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> int:
        return index


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no-loader": ([1, 2, 3], TypeError, r"DataLoader for training, got list"),
    "own-iteration": (OwnIteration(DATA, batch_size=5), TypeError, r"got OwnIteration with an `__iter__`"),
    "no-batch-size": (DataLoader(DATA, batch_size=None), ValueError, r"batch_size=None over Records"),
    "batch-sampler": (
        DataLoader(DATA, batch_sampler=[[0, 1], [2]]),
        ValueError,
        r"default batch sampler, got batch_sampler=list",
    ),
    "weighted": (
        DataLoader(DATA, batch_size=5, sampler=WeightedRandomSampler([1.0] * 20, 20)),
        ValueError,
        r"WeightedRandomSampler.*larger than the one reported",
    ),
    "subset": (
        DataLoader(DATA, batch_size=5, sampler=SubsetRandomSampler(range(10))),
        ValueError,
        r"SubsetRandomSampler over 10 of 20 records.*torch\.utils\.data\.Subset",
    ),
    "replacement": (
        DataLoader(DATA, batch_size=5, sampler=RandomSampler(DATA, replacement=True)),
        ValueError,
        r"replacement=True",
    ),
    "num-samples": (
        DataLoader(DATA, batch_size=5, sampler=RandomSampler(DATA, num_samples=7)),
        ValueError,
        r"RandomSampler over 7 of 20 records",
    ),
    "other-dataset": (
        DataLoader(DATA, batch_size=5, sampler=SequentialSampler(range(9))),
        ValueError,
        r"SequentialSampler over 9 of 20 records",
    ),
    "distributed-other": (
        DataLoader(DATA, batch_size=5, sampler=DistributedSampler(Records(9), num_replicas=2, rank=0)),
        ValueError,
        r"DistributedSampler over 9 of 20 records",
    ),
    "own-sampler": (DataLoader(DATA, batch_size=5, sampler=OwnSampler(DATA)), ValueError, r"sampler=OwnSampler"),
    "list-sampler": (DataLoader(DATA, batch_size=5, sampler=[1, 2]), ValueError, r"sampler=list"),
    "wrapped-weighted": (
        DataLoader(DATA, batch_size=5, sampler=DistributedSamplerWrapper(WeightedRandomSampler([1.0] * 20, 20), 20)),
        ValueError,
        r"WeightedRandomSampler",
    ),
    "batched-weighted": (
        DataLoader(DATA, batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 20, 20), 5, False)),
        ValueError,
        r"WeightedRandomSampler",
    ),
    "empty": (DataLoader([], batch_size=5), ValueError, r"at least one record, got len\(dataset\)=0"),
    "no-length": (DataLoader(NoLength(), batch_size=5), TypeError, r"NoLength without `__len__`"),
    "too-large": (DataLoader(DATA, batch_size=21), ValueError, r"got 21 \(batch_size=21 x .*\) for 20 records"),
}


@each("sampling", SAMPLINGS)
@each("case", REFUSED)
def test_loaders_that_cannot_be_private_are_refused(case: str, sampling: str) -> None:
    loader, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        private_dataloader(loader, sampling=sampling)


def test_expected_batch_counts_ranks_and_accumulation() -> None:
    with pytest.raises(ValueError, match=r"got 24 \(batch_size=4 x world_size=3 x accumulate=2\) for 20 records"):
        private_dataloader(DataLoader(DATA, batch_size=4), accumulate=2, world_size=3)


def test_streams_are_refused_under_poisson() -> None:
    with pytest.raises(TypeError, match=r'IterableDataset Stream\..*sampling="shuffle"'):
        private_dataloader(DataLoader(Stream(10), batch_size=2))
    with pytest.raises(ValueError, match=r"batch_size=None over Stream"):
        private_dataloader(DataLoader(Stream(10), batch_size=None), sampling="shuffle")
    with pytest.raises(ValueError, match=r"num_batches_kept=1"):
        private_dataloader(DataLoader(Stream(10), batch_size=2), sampling="shuffle", num_batches_kept=1)


def test_out_of_order_loading_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in_order=True, got in_order=False"):
        private_dataloader(DataLoader(DATA, batch_size=5, num_workers=2, in_order=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "ghost"}, r"one of \('poisson', 'shuffle', 'cyclic'\), got sampling='ghost'"),
        ({"accumulate": 0}, r"accumulate >= 1, got accumulate=0"),
        ({"world_size": 0}, r"world_size >= 1"),
        ({"rank": -1}, r"rank >= 0"),
        ({"rank": 2, "world_size": 2}, r"rank < world_size"),
        ({"microbatch_size": 0}, r"microbatch_size >= 1"),
        ({"num_batches_kept": 0}, r"num_batches_kept >= 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        private_dataloader(DataLoader(DATA, batch_size=5), **options)


@each("name", ["accumulate", "world_size", "rank", "microbatch_size", "num_batches_kept"])
@each("value", [1.0, True, math.nan])
def test_options_that_are_no_integers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"Expected an integer, got {name}="):
        private_dataloader(DataLoader(DATA, batch_size=5), **{name: value})


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (range(9), {"unit": range(9)}, "unit and records_per_unit together, got records_per_unit=None with a unit"),
        (range(9), {"records_per_unit": 2}, "together, got records_per_unit=2 without a unit"),
        (range(9), {"unit": range(9), "records_per_unit": 0}, "records_per_unit >= 1"),
        (
            Stream(10),
            {"unit": "who", "records_per_unit": 2, "sampling": "shuffle"},
            "random access for a unit, got a stream",
        ),
        (range(9), {"unit": [1] * 9, "records_per_unit": 1}, r"got 2 \(batch_size=2 x .*\) for 1 users"),
        (range(9), {"fixed_order": True}, "fixed_order for a stream only"),
        (range(9), {"public_assignment": 3}, "public_assignment=3 for sampling='poisson'"),
        (range(9), {"public_assignment": -1, "sampling": "cyclic"}, "public_assignment >= 0"),
    ],
    ids=["no-number", "no-unit", "zero", "stream", "few-users", "fixed-order", "assignment", "negative"],
)
def test_options_that_do_not_go_together_are_refused(dataset: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        private_dataloader(DataLoader(dataset, batch_size=2), **options)


def test_a_stream_is_refused_under_cyclic() -> None:
    with pytest.raises(TypeError, match=r"cyclic sampling, got the IterableDataset Stream\..*fixed_order=True"):
        private_dataloader(DataLoader(Stream(10), batch_size=2), sampling="cyclic")


FOUR = TensorDataset(torch.arange(4.0))
TWICE = [
    Subset(FOUR, [0, 1, 1, 2]),
    Subset(FOUR, torch.tensor([0, -1, 3])),  # type: ignore[arg-type]
    ConcatDataset([FOUR, FOUR]),
    ConcatDataset([Subset(FOUR, [0, 1]), Subset(Subset(FOUR, [3, 1]), [1])]),
]


@pytest.mark.parametrize("dataset", TWICE)
def test_a_dataset_with_a_record_twice_is_refused(dataset: Any) -> None:
    with pytest.raises(ValueError, match="Expected each record once, got"):
        private_dataloader(DataLoader(dataset, batch_size=1))
    ids = [0] * len(dataset)
    assert private_dataloader(DataLoader(dataset, batch_size=1), unit=ids, records_per_unit=2).facts.dataset_size == 1


@pytest.mark.parametrize(
    "dataset", [Subset(FOUR, np.arange(3)), ConcatDataset([FOUR, TensorDataset(torch.ones(2)), Subset([1, 2], [1])])]
)
def test_a_dataset_with_each_record_once_is_taken(dataset: Any) -> None:
    assert private_dataloader(DataLoader(dataset, batch_size=1)).facts.dataset_size == len(dataset)
