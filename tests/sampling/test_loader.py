"""Private sampling: what reaches the user's code, and which facts are public."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from lightning_dp.sampling import (
    LogicalBatch,
    PrivateDataLoader,
    collate_samples,
    peek_samples,
    private_dataloader,
)
from lightning_dp.sampling.fetch import as_it_is

SAMPLINGS = ("poisson", "shuffle")


def _type_name(value: object) -> str:
    return type(value).__name__


class Records(Dataset[Any]):
    """Record i is {"x": tensor(i), "name": str(i)}."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor(index), "name": str(index)}


class ManyRecords(Records):
    """Reads many at once and cannot stand an empty list."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        assert indices, "asked for no records"
        return [self[index] for index in indices]


class Stream(IterableDataset[Any]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


def members(loader: PrivateDataLoader) -> list[list[int]]:
    """Values of ``x`` in every item of one pass."""
    return [[value for _, batch in item.microbatches for value in batch["x"].tolist()] for item in loader]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dataset", [Records(40), ManyRecords(40), Subset(ManyRecords(80), range(40))], ids=_type_name)
def test_batches_are_collated_by_default_with_text_and_dicts(dataset: Dataset[Any], sampling: str) -> None:
    loader = private_dataloader(DataLoader(dataset, batch_size=10), sampling=sampling, microbatch_size=3)
    for item in loader:
        assert isinstance(item, LogicalBatch)
        for count, batch in item.microbatches:
            assert 1 <= count <= 3
            assert batch["x"].shape == (count,)
            assert batch["name"] == [str(value) for value in batch["x"].tolist()]
        counts = [count for count, _ in item.microbatches]
        assert sum(counts) == item.num_samples
        assert len(item) == len(counts) == -(-item.num_samples // 3)
        assert not counts or max(counts) - min(counts) <= 1


def test_user_collate_is_kept_and_never_called_with_nothing() -> None:
    def collate(samples: list[int]) -> str:
        assert samples
        return "-".join(str(sample) for sample in samples)

    loader = private_dataloader(DataLoader(range(50), batch_size=1, collate_fn=collate), microbatch_size=2)
    items = [item for _ in range(4) for item in loader]
    assert {bool(item) for item in items} == {True, False}  # e^-1 of 200 items are empty
    for item in items:
        assert [len(batch.split("-")) for _, batch in item.microbatches] == [count for count, _ in item.microbatches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_empty_parts_do_not_reach_the_dataset(num_workers: int) -> None:
    dataset = ManyRecords(40)
    loader = private_dataloader(DataLoader(dataset, batch_size=1, num_workers=num_workers), accumulate=2, seed=0)
    items = list(loader)
    assert len(items) == len(loader) == 40
    assert sum(not item for item in items) > 5
    assert all(item.num_samples == 0 and len(item) == 0 for item in items if not item)
    assert loader.dataset is dataset


def test_workers_give_the_same_batches_as_none() -> None:
    options: dict[str, Any] = {"microbatch_size": 4, "accumulate": 2, "seed": 5}
    alone = private_dataloader(DataLoader(ManyRecords(60), batch_size=6), **options)
    workers = private_dataloader(
        DataLoader(ManyRecords(60), batch_size=6, num_workers=2, persistent_workers=True), **options
    )
    for _ in range(2):
        assert members(alone) == members(workers)


def add_offset(worker: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert info is not None
    info.dataset.offset = 1000  # type: ignore[attr-defined]


class Shifted(ManyRecords):
    offset = 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index + self.offset)


def test_worker_init_fn_still_reaches_the_users_dataset() -> None:
    loader = private_dataloader(DataLoader(Shifted(20), batch_size=10, num_workers=1, worker_init_fn=add_offset))
    assert all(value >= 1000 for batch in members(loader) for value in batch)


def test_loader_options_are_kept() -> None:
    generator = torch.Generator()
    loader = private_dataloader(
        DataLoader(
            Records(20),
            batch_size=5,
            num_workers=2,
            pin_memory=True,
            timeout=30,
            worker_init_fn=add_offset,
            multiprocessing_context="spawn",
            generator=generator,
            prefetch_factor=3,
            persistent_workers=True,
            drop_last=True,
            shuffle=True,
        )
    )
    assert (loader.num_workers, loader.pin_memory, loader.timeout, loader.prefetch_factor) == (2, True, 30, 3)
    assert loader.worker_init_fn is add_offset
    assert loader.generator is generator
    assert loader.persistent_workers
    assert loader.multiprocessing_context.get_start_method() == "spawn"


def test_collate_can_be_sent_to_spawned_workers() -> None:
    collate = private_dataloader(DataLoader(Records(20), batch_size=5), microbatch_size=2).collate_fn
    item = pickle.loads(pickle.dumps(collate))([Records(20)[index] for index in range(5)])
    assert [count for count, _ in item.microbatches] == [1, 2, 2]


class Pinnable:
    pinned = False

    def pin_memory(self) -> Pinnable:
        other = Pinnable()
        other.pinned = True
        return other


def test_pin_memory_pins_every_microbatch() -> None:
    batch = LogicalBatch([(1, {"x": Pinnable(), "name": "a"}), (2, [Pinnable()])])
    pinned = batch.pin_memory()
    assert isinstance(pinned, LogicalBatch)
    assert [count for count, _ in pinned.microbatches] == [1, 2]
    assert pinned.microbatches[0][1]["x"].pinned
    assert pinned.microbatches[0][1]["name"] == "a"
    assert pinned.microbatches[1][1][0].pinned


def test_dataset_that_returns_one_joined_batch_is_refused() -> None:
    class Joined(Records):
        def __getitems__(self, indices: list[int]) -> torch.Tensor:
            return torch.tensor(indices)

    with pytest.raises(TypeError, match=r"one sample an index from Joined.__getitems__, got Tensor for 10 indices"):
        list(private_dataloader(DataLoader(Joined(10), batch_size=10)))


def test_logical_batch_counts() -> None:
    batch = LogicalBatch([(3, "abc"), (2, "de")])
    assert (len(batch), batch.num_samples, bool(batch)) == (2, 5, True)
    empty = LogicalBatch([])
    assert (len(empty), empty.num_samples, bool(empty)) == (0, 0, False)


@pytest.mark.parametrize("dataset", [Records(5), ManyRecords(5), TensorDataset(torch.arange(5))], ids=_type_name)
@pytest.mark.parametrize("num", [0, 2, 9])
def test_peek_reads_first_samples_and_collates_as_the_user_does(dataset: Dataset[Any], num: int) -> None:
    for loader in (DataLoader(dataset, batch_size=2), private_dataloader(DataLoader(dataset, batch_size=2))):
        samples = peek_samples(loader, num)
        assert [str(sample) for sample in samples] == [str(dataset[index]) for index in range(min(num, 5))]
        if samples:
            batch = collate_samples(loader, samples)
            values = batch["x"] if isinstance(batch, dict) else batch[0]
            assert values.tolist() == list(range(min(num, 5)))


def test_peek_at_a_stream_and_collate_nothing() -> None:
    loader = DataLoader(Stream(5), batch_size=2)
    assert peek_samples(loader, 3) == [0, 1, 2]
    assert peek_samples(loader, 9) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="at least one sample"):
        collate_samples(loader, [])


class Table:
    """Rows that stay together, as in a ``TensorDict``: read by a list of indices, joined by ``torch.stack``."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: Any) -> Table:
        return Table({name: column[index] for name, column in self.columns.items()})

    __getitems__ = __getitem__

    def unbind(self, dim: int) -> list[Table]:
        return [self[index] for index in range(len(self))]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Table:
        assert func is torch.stack
        return Table({name: torch.stack([row.columns[name] for row in args[0]]) for name in args[0][0].columns})


def test_rows_that_a_dataset_reads_together_are_joined_again() -> None:
    table = Table({"x": torch.arange(12.0).reshape(6, 2), "y": torch.arange(6)})
    loader = private_dataloader(DataLoader(table, batch_size=3, collate_fn=as_it_is), sampling="shuffle")  # type: ignore[arg-type]
    parts = [part for item in loader for _, part in item.microbatches]
    assert all(isinstance(part, Table) for part in parts)
    rows = sorted(row.columns["y"].item() for part in parts for row in part.unbind(0))
    assert rows == list(range(6))
    assert collate_samples(loader, peek_samples(loader, 2)).columns["x"].tolist() == [[0.0, 1.0], [2.0, 3.0]]


@pytest.mark.parametrize("read", [list, lambda batch: batch["x"], lambda batch: batch.x])
def test_batch_that_user_code_takes_from_the_loader_is_named(read: Any) -> None:
    with pytest.raises((TypeError, AttributeError), match="Read examples from your own DataLoader"):
        read(pickle.loads(pickle.dumps(LogicalBatch([(2, [1, 2])]))))
