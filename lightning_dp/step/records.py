"""TrainingRecords: a few records of the training set for trials, and a stand-in for empty batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from lightning_dp.sampling import PrivateDataLoader, collate_samples, peek_samples
from lightning_dp.sampling.checks import dataset_length
from lightning_dp.step import checks
from lightning_dp.step.randomness import kept_generators


class TrainingRecords:
    """Records of a training set, collated and moved to the device as real batches are.

    **Guarantee**: none: records are private. Which ones are read is public, and the same in every run.

    Args:
        loader: the private loader.
        move: moves a collated batch to the device.
        axes: of ``learn_rows``, if known.
    """

    def __init__(self, loader: PrivateDataLoader, move: Callable[[Any], Any], axes: tuple[str, ...] = ()) -> None:
        self.loader, self._move, self.axes = loader, move, axes
        self._stand_in: list[Any] | None = None

    def take(self, num: int, seed: int = 0) -> list[Any]:
        """Return records from all over a dataset with random access, the first ones of a stream.

        The positions are pseudo-random and always the same for a seed, so that neither sorted nor periodic data makes
        the records alike.

        Args:
            num: records; fewer if the dataset has fewer.
            seed: chooses the positions.
        """
        loader = self.loader
        if isinstance(loader.dataset, IterableDataset):
            return peek_samples(loader, num)
        size = self._num_records or 0
        positions = np.random.default_rng(seed).choice(size, size=min(num, size), replace=False)
        return [loader.dataset[int(position)] for position in positions]

    def learn_rows(self, device: torch.device) -> None:
        """Find the tensors of a collated batch that have one row per record.

        Args:
            device: its global generator and those of the CPU are restored.
        """
        pair = (self.take(2) * 2)[:2]
        with kept_generators(device):
            two, three = (collate_samples(self.loader, (pair * size)[:size]) for size in (2, 3))
        self.axes = checks.sample_axes(two, three)

    def batch_of(self, records: list[Any]) -> Any:
        """Return records collated and moved to the device.

        Raises:
            PrivacyError: the collate function drops or adds records.
        """
        batch = collate_samples(self.loader, records)
        checks.check_rows(batch, len(records), self.axes)
        return self._move(batch)

    def stand_in(self, copies: int = 1) -> Any:
        """Return a batch on the device that replaces an empty one: one record, or copies of it."""
        if self._stand_in is None:
            self._stand_in = peek_samples(self.loader, 1)
        return self.batch_of(self._stand_in * copies)

    def batch_size(self, world_size: int, limit: int | None) -> int:
        """Return the expected number of records in a real microbatch of one rank, at most the dataset size.

        Args:
            world_size: ranks.
            limit: the ``microbatch_size`` of the settings.
        """
        facts, each = self.loader.facts, self.loader.facts.records_per_unit or 1
        drawn = max(1, facts.expected_batch_size // (world_size * facts.accumulate)) * each
        return min(drawn, limit or drawn, self._num_records or drawn)

    @property
    def _num_records(self) -> int | None:
        """Number of records of the training set; None if unknown."""
        facts = self.loader.facts
        return dataset_length(self.loader.dataset) if facts.unit == "user" else facts.dataset_size
