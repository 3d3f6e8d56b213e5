"""Who sees what: disjoint shards that do not depend on the records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset, default_collate

from lightning_dp.datalens import StepsOver, partition
from lightning_dp.datalens.shards import public_generator, read_shards
from tests.datalens.helpers import make_records


@pytest.mark.parametrize(("records", "teachers"), [(60, 6), (61, 6), (65, 6), (5, 5), (10_007, 500)])
def test_shards_are_disjoint_and_leave_out_the_remainder_only(records: int, teachers: int) -> None:
    indices = partition(records, teachers, seed=3)
    assert indices.shape == (teachers, records // teachers)
    flat = indices.flatten()
    assert len(flat.unique()) == len(flat)
    assert 0 <= int(flat.min()) <= int(flat.max()) < records


def test_shards_follow_from_sizes_and_seed() -> None:
    assert torch.equal(partition(60, 6, seed=1), partition(60, 6, seed=1))
    assert not torch.equal(partition(60, 6, seed=1), partition(60, 6, seed=2))
    torch.manual_seed(0)
    first = partition(60, 6)
    torch.manual_seed(1)
    assert torch.equal(first, partition(60, 6))


def test_shards_mix_the_order_of_the_dataset() -> None:
    """A data set sorted by class must not give teachers of one class: 100 shards of 100 records, by 5 standard
    errors.
    """
    share = (partition(10_000, 100) < 5000).double().mean(1)
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / 10


def test_more_teachers_than_records() -> None:
    with pytest.raises(ValueError, match="num_teachers <= 4"):
        partition(4, 5)


def test_reading_gives_each_teacher_its_records() -> None:
    records = make_records(61)
    indices = partition(61, 6)
    shards = read_shards(records, indices, num_classes=2)
    features, labels = records.tensors
    assert torch.equal(shards.features, features[indices])
    assert torch.equal(shards.labels, labels[indices])


def test_a_collate_function_mixes_no_records() -> None:
    records, indices = make_records(60), partition(60, 6)

    def centred(items: list[Any]) -> Any:
        features, labels = default_collate(items)
        return features - 0.5 * features.mean(0), labels

    shards = read_shards(records, indices, num_classes=2, collate=centred)
    torch.testing.assert_close(shards.features, 0.5 * records.tensors[0][indices])


@pytest.mark.parametrize("items", [torch.zeros(8, 3), TensorDataset(torch.zeros(8, 3)), make_records(8)])
def test_one_class_needs_no_label_and_ignores_it(items: Any) -> None:
    shards = read_shards(items, partition(8, 2))
    assert shards.features.shape == (2, 4, 3)
    assert bool((shards.labels == 0).all())


@pytest.mark.parametrize(
    ("items", "num_classes", "error", "message"),
    [
        (make_records(8), 1 + 2, None, ""),
        (TensorDataset(torch.zeros(8, 3), torch.full((8,), 2)), 2, ValueError, "labels from 0 to 1"),
        (TensorDataset(torch.zeros(8, 3), -torch.ones(8, dtype=torch.long)), 2, ValueError, "labels from 0 to 1"),
        (TensorDataset(torch.zeros(8, 3)), 2, TypeError, "num_classes=1"),
        (TensorDataset(torch.zeros(8, 3, dtype=torch.uint8), torch.zeros(8).long()), 2, TypeError, "floating-point"),
        (TensorDataset(torch.zeros(8, 3), torch.zeros(8)), 2, TypeError, "one whole number"),
        (["text"] * 8, 1, TypeError, "records"),
    ],
)
def test_records_of_another_form(items: Any, num_classes: int, error: Any, message: str) -> None:
    if error is None:
        assert read_shards(items, partition(8, 2), num_classes=num_classes).labels.shape == (2, 4)
        return
    with pytest.raises(error, match=message):
        read_shards(items, partition(8, 2), num_classes=num_classes)


def test_public_randomness_depends_on_its_purpose() -> None:
    draws = [torch.rand(4, generator=public_generator(*key)) for key in ((0, 1), (0, 2), (1, 1), (0, 1, 1))]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(draws[0], torch.rand(4, generator=public_generator(0, 1)))


def test_steps_over_makes_no_batches() -> None:
    loader = StepsOver(make_records(), 7)
    assert len(loader) == 7
    assert list(loader) == list(range(7))
    with pytest.raises(ValueError, match="steps_per_epoch >= 1"):
        StepsOver(make_records(), 0)
