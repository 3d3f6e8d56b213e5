"""Rows gathered from whole tensors are, bit for bit, the samples read one by one and stacked; nothing else is
gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from lightning_dp.sampling import private_dataloader
from lightning_dp.sampling.gather import Gather

SIZE = 23


def tensors() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SIZE, 3, 2, generator=generator)
    return (
        values,
        values[:, 0, 0],
        values.transpose(0, 2).contiguous().transpose(0, 2),
        values.bfloat16(),
        values > 0,
        torch.arange(SIZE),
        values[:, :0],
        torch.complex(values, values),
    )


class Negated(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        return tuple(-tensor for tensor in super().__getitem__(index))


class Shifted(Subset[Any]):
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0)

    def __getitems__(self, indices: list[int]) -> Any:
        return super().__getitems__([0] * len(indices))


class Kind(Tensor):
    """A tensor with a type of its own."""


def whole() -> TensorDataset:
    return TensorDataset(*tensors())


def batches(dataset: Dataset[Any], collate_fn: Any = None, num_workers: int = 0) -> list[list[tuple[int, Any]]]:
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate_fn, num_workers=num_workers)
    private = private_dataloader(loader, microbatch_size=3, seed=3)
    items = [item.microbatches for _ in range(5) for item in private]
    assert private.dataset is dataset
    return items


GATHERED: dict[str, Callable[[], Dataset[Any]]] = {
    "tensors": whole,
    "one tensor": lambda: TensorDataset(tensors()[0]),
    "subset": lambda: Subset(whole(), [7, 1, -1, 3, 4, 20]),
    "range": lambda: Subset(whole(), range(4, 16)),
    "tensor of indices": lambda: Subset(whole(), torch.randperm(SIZE)[:9]),  # type: ignore[arg-type]
    "array of indices": lambda: Subset(whole(), np.arange(9)),  # type: ignore[arg-type]
    "subset of a subset": lambda: Subset(Subset(whole(), [9, 8, 7, 6, 5, 4, 3]), [1, 2, 6, -2, 0]),
    "random split": lambda: torch.utils.data.random_split(whole(), [15, 8])[0],
}


@pytest.mark.parametrize("name", GATHERED)
def test_gathered_batches_are_those_of_samples_read_one_by_one(name: str) -> None:
    dataset = GATHERED[name]()
    assert Gather.of(dataset, default_collate) is not None
    gathered = batches(dataset)
    with mock.patch.object(Gather, "of", return_value=None):
        expected = batches(dataset)
    assert sum(count for item in expected for count, _ in item) > 8
    assert [[count for count, _ in item] for item in gathered] == [[count for count, _ in item] for item in expected]
    for got, want in zip(gathered, expected, strict=True):
        for (_, batch), (_, other) in zip(got, want, strict=True):
            assert type(batch) is type(other) is list
            for one, two in zip(batch, other, strict=True):
                assert (type(one), one.dtype, one.stride()) == (type(two), two.dtype, two.stride())
                assert torch.equal(one, two)


OTHERS: dict[str, Callable[[], Any]] = {
    "own samples": lambda: Negated(*tensors()),
    "own subset": lambda: Shifted(whole(), range(20)),
    "subset of own samples": lambda: Subset(Negated(*tensors()), range(20)),
    "own type of tensor": lambda: TensorDataset(torch.arange(SIZE).as_subclass(Kind)),
    "sparse": lambda: TensorDataset(torch.eye(SIZE).to_sparse()),
    "several": lambda: torch.utils.data.ConcatDataset([whole(), whole()]),
    "indices as truth values": lambda: Subset(whole(), [True] * 9),
    "indices of no type": lambda: Subset(whole(), [object()] * 9),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", OTHERS)
def test_datasets_of_other_kinds_are_read_sample_by_sample(name: str) -> None:
    assert Gather.of(OTHERS[name](), default_collate) is None


def test_samples_and_collate_functions_of_the_user_are_asked() -> None:
    for _, batch in [part for item in batches(Negated(torch.arange(1, SIZE + 1))) for part in item]:
        assert (batch[0] < 0).all()
    for count, batch in [part for item in batches(whole(), collate_fn=len) for part in item]:
        assert batch == count
    assert Gather.of(whole(), len) is None


def test_workers_see_the_dataset_of_the_user() -> None:
    with mock.patch.object(Gather, "of", side_effect=AssertionError("asked for in vain")):
        assert batches(whole(), num_workers=1)


def test_rows_are_those_of_now() -> None:
    dataset = TensorDataset(torch.zeros(SIZE))
    items = iter(private_dataloader(DataLoader(dataset, batch_size=SIZE // 2), seed=1))
    assert not any(batch[0].any() for _, batch in next(items).microbatches)
    dataset.tensors = (torch.ones(SIZE),)
    assert all(batch[0].all() for _, batch in next(items).microbatches)
