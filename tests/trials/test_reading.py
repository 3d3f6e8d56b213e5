"""Reading check: items that depend on other items are refused, whatever carries the dependence."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dp import PrivacyError
from lightning_dp.trials.reading import check_reading

RECORDS = torch.arange(12.0).reshape(4, 3) + 1


class Data(Dataset[Any]):
    """Four records; subclasses change how an item is made."""

    def __init__(self) -> None:
        self.mean, self.buffer = torch.zeros(3), np.zeros(3)
        self.last: Any = None
        self.cache: dict[int, Tensor] = {}
        self.reads, self.rng, self.torch_rng = 0, np.random.default_rng(0), torch.Generator()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.item(RECORDS[index].clone(), index), index

    def item(self, record: Tensor, index: int) -> Any:
        return record


class RunningMean(Data):
    def item(self, record: Tensor, index: int) -> Any:
        self.mean = 0.9 * self.mean + 0.1 * record
        return record - self.mean


class MixesTheLast(Data):
    def item(self, record: Tensor, index: int) -> Any:
        before, self.last = self.last, record
        return record if before is None else (record + before) / 2


class MixesNowAndThen(MixesTheLast):
    def item(self, record: Tensor, index: int) -> Any:
        mixed = super().item(record, index)
        return mixed if random.random() < 0.3 else record


LAST: list[Any] = []
MEAN = torch.zeros(3)


class MixesTheLastOfAll(Data):
    """Keeps the last record in a global list."""

    def item(self, record: Tensor, index: int) -> Any:
        LAST.append(record)
        return sum(LAST[-2:])


class GlobalMean(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return RECORDS[index] - MEAN.mul_(0.9).add_(RECORDS[index], alpha=0.1)


class ClassMean(Data):
    of_all = torch.zeros(3)

    def item(self, record: Tensor, index: int) -> Any:
        type(self).of_all = 0.9 * self.of_all + 0.1 * record
        return record - self.of_all


class OneBuffer(Data):
    def item(self, record: Tensor, index: int) -> Any:
        self.buffer[:] = record.numpy()
        return self.buffer


class NormalisesTogether(Data):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        records = RECORDS[indices]
        return list(zip(records - records.mean(0), indices, strict=True))


class AddsTheFirst(Data):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(RECORDS[index] + RECORDS[indices[0]], index) for index in indices]


class CountsReads(Data):
    """How often it was read follows from how many records were drawn, which is private."""

    def item(self, record: Tensor, index: int) -> Any:
        self.reads += 1
        return record / self.reads


REFUSED: list[type[Dataset[Any]]] = [
    RunningMean, MixesTheLast, MixesNowAndThen, MixesTheLastOfAll, GlobalMean, ClassMean, OneBuffer,
    NormalisesTogether, AddsTheFirst, CountsReads,
]  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_items_that_depend_on_others_are_refused(kind: type[Dataset[Any]]) -> None:
    with pytest.raises(PrivacyError, match=r"An item of the dataset was read, and (its memory|it) was"):
        check_reading(kind(), [2, 0, 3])


class Caches(Data):
    def item(self, record: Tensor, index: int) -> Any:
        self.reads += 1
        return self.cache.setdefault(index, record)


class OwnGenerators(Data):
    def item(self, record: Tensor, index: int) -> Any:
        return record + self.rng.normal() + torch.randn(3, generator=self.torch_rng)


class FromTheSystem(Data):
    def item(self, record: Tensor, index: int) -> Any:
        return record + np.random.default_rng().normal()

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Augments(FromTheSystem):
    def item(self, record: Tensor, index: int) -> Any:
        return {"x": [record + torch.randn(3), np.random.rand()], "y": "word"}  # noqa: NPY002


class NamesATypeOfNumbers(Data):
    dtype = np.float32


@pytest.mark.parametrize("kind", [Data, Caches, OwnGenerators, FromTheSystem, Augments, NamesATypeOfNumbers])
def test_items_of_their_own_are_free(kind: type[Data]) -> None:
    dataset = kind()
    check_reading(dataset, [2, 0, 3])
    check_reading(dataset, [1, 2])
    check_reading(dataset, [0])
    assert dataset.rng.normal() == np.random.default_rng(0).normal()


def test_reading_leaves_global_generators_alone() -> None:
    states = torch.get_rng_state(), random.getstate()
    check_reading(Augments(), [0, 1, 2])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
