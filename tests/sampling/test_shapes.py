"""Training data that is not one loader over records: made into one, or refused by the name of what was given."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_dp.sampling import one_loader, private_dataloader


class InBulk(Dataset[Any]):
    """Reads a list of records at once, as columnar stores do, and refuses to read one."""

    def __init__(self, size: int) -> None:
        self.values = torch.arange(size)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        assert isinstance(positions, list)
        return {"value": self.values[positions]}


def bulk(size: int, batch_size: int, sampler: Any = None) -> DataLoader[Any]:
    dataset = InBulk(size)
    return DataLoader(
        dataset, sampler=BatchSampler(sampler or RandomSampler(dataset), batch_size, drop_last=False), batch_size=None
    )


class Batches:
    """An iterable of collated batches, with a length."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


# ---------------------------------------------------------------- bulk loading


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bulk_loading_draws_records_and_cuts_microbatches(num_workers: int) -> None:
    loader = bulk(40, 8)
    loader.num_workers = num_workers
    private = private_dataloader(one_loader(loader, sampling="shuffle"), sampling="shuffle", microbatch_size=3)
    assert (private.facts.dataset_size, private.facts.expected_batch_size) == (40, 8)
    seen: Counter[int] = Counter()
    for batch in private:
        for count, part in batch.microbatches:
            assert count == len(part["value"]) <= 3
            seen.update(part["value"].tolist())
    assert seen == Counter(range(40))


def test_bulk_loading_reads_through_a_subset() -> None:
    chosen = Subset(InBulk(40), range(10, 22))
    loader = DataLoader(chosen, sampler=BatchSampler(RandomSampler(chosen), 4, drop_last=False), batch_size=None)
    private = private_dataloader(one_loader(loader, sampling="shuffle"), sampling="shuffle")
    seen = [value for batch in private for _, part in batch.microbatches for value in part["value"].tolist()]
    assert sorted(seen) == list(range(10, 22))


def test_bulk_loading_joins_each_record_at_the_sample_rate() -> None:
    private = private_dataloader(one_loader(bulk(50, 10), sampling="poisson"), seed=3)
    assert private.facts.sample_rate == 0.2
    counts = np.zeros(50)
    for _ in range(200):
        for batch in private:
            for _, part in batch.microbatches:
                np.add.at(counts, part["value"].numpy(), 1)
    rate = counts / 1000
    # per record 4 standard errors are 0.05; of the mean over 50 records 0.0072
    assert np.abs(rate - 0.2).max() < 0.06
    assert abs(rate.mean() - 0.2) < 0.0072


def test_bulk_loading_with_a_sampler_of_its_own_is_refused() -> None:
    loader = one_loader(bulk(40, 8, WeightedRandomSampler(torch.ones(40), 40)), sampling="poisson")
    with pytest.raises(ValueError, match="got sampler=WeightedRandomSampler"):
        private_dataloader(loader)
    with pytest.raises(ValueError, match="RandomSampler over 20 of 40 records"):
        private_dataloader(one_loader(bulk(40, 8, RandomSampler(range(20))), sampling="poisson"))


def test_datasets_read_in_bulk_keep_attributes_and_copy() -> None:
    dataset = one_loader(bulk(40, 8), sampling="poisson").dataset
    assert len(dataset.values) == len(dataset) == 40
    for other in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert len(other) == 40
        assert not hasattr(other, "nothing")


# ---------------------------------------------------------------- collections


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [(lambda one: [one], lambda batch: batch[0]), (lambda one: {"a": {"b": one}}, lambda batch: batch["a"]["b"])],
)
def test_one_loader_in_a_collection_keeps_its_structure(wrap: Any, unwrap: Any) -> None:
    loader = DataLoader(TensorDataset(torch.arange(12)), batch_size=4, shuffle=True)
    private = private_dataloader(one_loader(wrap(loader), sampling="shuffle"), sampling="shuffle")
    values = [int(v) for batch in private for _, part in batch.microbatches for v in unwrap(part)[0]]
    assert sorted(values) == list(range(12))


def test_loaders_of_equal_length_are_parts_of_one_record() -> None:
    first = DataLoader(TensorDataset(torch.arange(12)), batch_size=4, shuffle=True)
    second: Any = DataLoader(range(100, 112), batch_size=4, collate_fn=lambda items: [str(item) for item in items])
    private = private_dataloader(one_loader({"x": first, "y": second}, sampling="poisson"), microbatch_size=2)
    assert private.facts.sample_rate == pytest.approx(1 / 3)
    for batch in private:
        for count, part in batch.microbatches:
            assert len(part["x"][0]) == count <= 2
            assert [str(100 + int(value)) for value in part["x"][0]] == part["y"]


def loader_of(size: int = 12, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(size)), batch_size=batch_size, **options)


class Own(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(3))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(100))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([loader_of(), loader_of(13)], ValueError, "12 records in batches of 4, 13 records in batches of 4"),
        ([loader_of(), loader_of(batch_size=3)], ValueError, "12 records in batches of 3"),
        ({"a": loader_of(), "b": [1, 2]}, TypeError, "in the dict of training data, got DataLoader, int"),
        ([], TypeError, "in the list of training data, got none"),
        ([Own(range(12), 4)], TypeError, "got Own with an `__iter__` of its own"),
        ([DataLoader(Endless(), 4), DataLoader(Endless(), 4)], ValueError, "random access in 2 training loaders"),
        (
            [loader_of(), loader_of(sampler=WeightedRandomSampler(torch.ones(12), 12))],
            ValueError,
            "got sampler=WeightedRandomSampler",
        ),
    ],
)
def test_collections_that_are_no_records_name_what_was_given(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        one_loader(given, sampling="shuffle")


@pytest.mark.parametrize("mode", ["max_size", "max_size_cycle"])
def test_longer_loaders_are_refused_where_all_is_read(mode: str) -> None:
    with pytest.raises(ValueError, match="leaves out what is beyond the shortest"):
        one_loader([loader_of(), loader_of(20)], sampling="poisson", mode=mode)


def test_min_size_leaves_out_what_is_beyond_the_shortest(caplog: pytest.LogCaptureFixture) -> None:
    loaders = [loader_of(20, shuffle=True), loader_of(12), loader_of(16)]
    with caplog.at_level(logging.INFO):
        loader = one_loader(loaders, sampling="shuffle", mode="min_size")
    assert "the first 12 records" in caplog.text
    private = private_dataloader(loader, sampling="shuffle")
    assert private.facts.dataset_size == 12
    drawn = [part for batch in private for _, part in batch.microbatches]
    assert sorted(int(value) for part in drawn for value in part[0][0]) == [*range(12)]
    assert all(torch.equal(part[0][0], part[place][0]) for part in drawn for place in (1, 2))
    with pytest.raises(ValueError, match="20 records in batches of 5"):
        one_loader([loader_of(), loader_of(20, batch_size=5)], sampling="poisson", mode="min_size")


def test_a_stream_in_a_collection_keeps_its_structure() -> None:
    loader = one_loader({"only": DataLoader(Endless(), batch_size=8, drop_last=True)}, sampling="shuffle")
    batches = list(private_dataloader(loader, sampling="shuffle"))
    assert len(batches) == 12
    assert batches[0].microbatches[0][1]["only"].tolist() == list(range(8))


def test_loaders_read_one_after_the_other_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 in mode='sequential'"):
        one_loader([loader_of(), loader_of()], sampling="poisson", mode="sequential")


# ---------------------------------------------------------------- iterables of batches


def test_an_iterable_of_batches_is_a_stream_of_its_rows() -> None:
    batches = Batches(
        {"x": torch.arange(8.0).reshape(4, 2), "name": ["a", "b", "c", "d"], "n": np.arange(4)},
        {"x": torch.arange(8.0, 14.0).reshape(3, 2), "name": ["e", "f", "g"], "n": np.arange(4, 7)},
    )
    private = private_dataloader(one_loader(batches, sampling="shuffle"), sampling="shuffle", microbatch_size=2)
    assert (private.facts.expected_batch_size, private.facts.steps_per_epoch) == (4, 2)
    assert not private.facts.add_remove_changes_one_batch
    first, second = private
    assert [count for count, _ in first.microbatches] == [2, 2]
    assert [count for count, _ in second.microbatches] == [1, 2]
    torch.testing.assert_close(first.microbatches[1][1]["x"], torch.arange(4.0, 8.0).reshape(2, 2))
    assert second.microbatches[1][1]["name"] == ["f", "g"]
    np.testing.assert_array_equal(second.microbatches[1][1]["n"], [5, 6])


class InTurn:
    """Batches by an object that is its own iterator.

    Args:
        batches: in their order.
        begins: whether a further pass begins again; else all passes share one iterator.
    """

    def __init__(self, batches: list[Any], *, begins: bool) -> None:
        self.batches, self.begins, self.at, self.shared = batches, begins, 0, [0]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> InTurn:
        self.at = 0
        return self

    def __next__(self) -> Any:
        if not self.begins:
            self.at = self.shared[0]
            self.shared[0] += 1
        if self.at >= len(self.batches):
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]


def test_passes_of_an_object_that_iterates_itself_are_apart() -> None:
    batches = InTurn(list(torch.arange(6.0).reshape(3, 2, 1)), begins=True)
    private = private_dataloader(one_loader(batches, sampling="shuffle"), sampling="shuffle")
    first = iter(private)
    next(first)
    for _ in range(2):
        assert [float(batch.microbatches[0][1].sum()) for batch in private] == [1.0, 5.0, 9.0]
    assert [float(batch.microbatches[0][1].sum()) for batch in first] == [5.0, 9.0]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (Batches(torch.zeros(2, 1), torch.zeros(3, 1)), ValueError, "batches of 2 rows.* got 3"),
        (Batches(torch.zeros(2, 1), torch.zeros(1, 1), torch.zeros(2, 1)), ValueError, "batches of 2 rows.* got 1"),
        (Batches((torch.zeros(2, 1), torch.zeros(3))), TypeError, r"one row per record, got lengths \[2, 3\]"),
        (Batches((torch.zeros(2, 1), torch.tensor(5))), TypeError, "one row per record, got Tensor"),
        (Batches({"x": torch.zeros(2, 1), "total": 7}), TypeError, "one row per record, got int"),
        (Batches(), ValueError, "batches to train on, got none from Batches"),
        ((batch for batch in [torch.zeros(2, 1)]), ValueError, "read more than once, got a generator.* no length"),
        (InTurn([torch.zeros(2, 1)] * 3, begins=False), ValueError, "second pass has 2 batches instead of 3"),
    ],
)
def test_iterables_of_indistinct_records_are_refused(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(private_dataloader(one_loader(batches, sampling="shuffle"), sampling="shuffle"))


def test_an_iterable_of_batches_cannot_be_sampled() -> None:
    batches = Batches(torch.zeros(2, 1))
    assert one_loader(batches, sampling="poisson") is batches
    with pytest.raises(
        TypeError, match=r'got Batches.* trains under sampling="shuffle" with neighboring_relation="replace_one"'
    ):
        private_dataloader(batches)  # type: ignore[arg-type]
