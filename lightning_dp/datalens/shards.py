"""Disjoint shards by index, and the source of public randomness: everything drawn except the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

_READ_AT_ONCE = 4096  # records


def public_generator(seed: int, *purpose: int) -> torch.Generator:
    """Return a generator of public randomness, the same on every rank.

    Args:
        seed: the public seed, >= 0.
        purpose: numbers >= 0 that identify the purpose; other numbers give independent draws.
    """
    state = np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def partition(num_records: int, num_teachers: int, seed: int = 0) -> Tensor:
    """Assign the record indices to disjoint shards, one per teacher.

    **Guarantee**: every record is in at most one shard. The shards depend on the two sizes and the public seed only,
    never on the records, so replacing one record changes one shard. The ``num_records % num_teachers`` records left
    over are used by no teacher.

    Args:
        num_records: n, number of records.
        num_teachers: N, number of teachers, at most n.
        seed: public seed.

    Returns:
        Indices, shape (N, n // N). Public.

    Raises:
        ValueError: fewer records than teachers.

    Example:
        >>> partition(7, 3).shape
        torch.Size([3, 2])
    """
    if num_records < num_teachers:
        raise ValueError(
            f"Expected num_teachers <= {num_records}, the number of records, got num_teachers={num_teachers}. A "
            "teacher needs at least one record; ten or more are better."
        )
    shard_size = num_records // num_teachers
    order = torch.randperm(num_records, generator=public_generator(seed, 0))
    return order[: num_teachers * shard_size].view(num_teachers, shard_size)


class Shards(NamedTuple):
    """The records of several teachers. Private.

    Args:
        features: shape (teachers, shard size, ...), floating.
        labels: shape (teachers, shard size), integer.
    """

    features: Tensor
    labels: Tensor


def read_shards(
    dataset: Any,
    indices: Tensor,
    *,
    num_classes: int = 1,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Shards:
    """Read the records of the given shards into memory.

    Args:
        dataset: map-style, with items ``(features, label)``, or ``features`` alone when there is one class.
        indices: shape (teachers, shard size), from ``partition``.
        num_classes: number of classes; labels are whole numbers from 0 to ``num_classes - 1``.
        collate: makes a batch of a list of items, and is given one item at a time, so that it can mix no records;
            default: torch's.

    Returns:
        Features and labels of the shards. Private.

    Raises:
        TypeError: items of another form.
        ValueError: labels out of range.
    """
    collate = default_collate if collate is None else collate
    parts = [
        _features_and_labels(collate([dataset[int(i)] for i in some]), num_classes)
        for some in torch.split(indices.reshape(-1), _READ_AT_ONCE if collate is default_collate else 1)
    ]
    features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    if not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ValueError(
            f"Expected labels from 0 to {num_classes - 1}, got num_classes={num_classes} and a label outside. Pass the "
            "number of classes, and labels that count from 0."
        )
    return Shards(features.view(*indices.shape, *features.shape[1:]), labels.view(indices.shape))


def _features_and_labels(batch: Any, num_classes: int) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        batch = batch[0]
    features, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if labels is None and num_classes == 1 and isinstance(features, Tensor):
        labels = torch.zeros(len(features), dtype=torch.long)
    if not (isinstance(features, Tensor) and features.is_floating_point() and isinstance(labels, Tensor)):
        raise TypeError(
            "Expected records (features, label) with floating-point features, or features alone with num_classes=1, "
            f"got {_form(batch)}. Wrap the dataset so that its items have this form."
        )
    if num_classes == 1:
        labels = torch.zeros(len(features), dtype=torch.long)
    if labels.is_floating_point() or labels.dim() != 1:
        raise TypeError(
            f"Expected one whole number per record as label, got {_form(labels)}. Encode labels as 0, 1, ..."
        )
    return features, labels.long()


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of " + ", ".join(_form(item) for item in value)
    return type(value).__name__


class StepsOver(Sequence[int]):
    """A training loader without batches, which only sets the number of steps per epoch.

    The teachers read the records once, so DataLens would not use the batches of a DataLoader.

    Args:
        dataset: the teachers' data, map-style.
        steps_per_epoch: training steps of one Lightning epoch, >= 1.

    Example:
        >>> len(StepsOver([1.0, 2.0], steps_per_epoch=100))
        100
    """

    def __init__(self, dataset: Sized, steps_per_epoch: int) -> None:
        if not 1 <= steps_per_epoch < math.inf:
            raise ValueError(f"Expected steps_per_epoch >= 1, got steps_per_epoch={steps_per_epoch}. Raise it.")
        self.dataset = dataset
        self.steps_per_epoch = steps_per_epoch

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __getitem__(self, step: Any) -> Any:
        return range(self.steps_per_epoch)[step]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.steps_per_epoch))
