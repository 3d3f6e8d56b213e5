"""TrainingRecords: a few records of the training set, for trials and in place of empty batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling import PrivateDataLoader, collate_samples, peek_samples
from lightning_dp.sampling.checks import dataset_length
from lightning_dp.sampling.fetch import read
from lightning_dp.sampling.gather import is_plain
from lightning_dp.sampling.make import user_collate
from lightning_dp.sampling.randomness import fresh_randomness
from lightning_dp.sandbox.randomness import kept_generators
from lightning_dp.step import checks
from lightning_dp.trials.chosen_records import differing, whole_numbers
from lightning_dp.trials.given_records import Collated, Reread
from lightning_dp.trials.loading import KeptState, check_collating, is_own
from lightning_dp.trials.made_records import apart, has_floats
from lightning_dp.trials.partners import check_partners
from lightning_dp.trials.ranks import mark_of
from lightning_dp.trials.reading import check_reading
from lightning_dp.trials.repeats import check_repeats
from lightning_dp.trials.row_order import RowOrder

_NUM_PLACES = 16  # records that are compared from pass to pass


class TrainingRecords:
    """Records of a training set, collated and moved to the device as real batches are.

    **Guarantee**: none, because records are private. Their positions are public, and the same in every run.

    Args:
        loader: returns the private loader, which may be replaced during a fit.
        move: moves a collated batch to the device.
        aside: makes a context after which what reading has set is put back.
    """

    def __init__(
        self,
        loader: Callable[[], PrivateDataLoader],
        move: Callable[[Any], Any],
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._loader, self.move, self._aside = loader, move, aside
        self.axes: tuple[str, ...] = ()
        """Paths of the tensors of a batch that have one row per record, once ``learn_rows`` has found them."""
        self._stand_in: tuple[PrivateDataLoader, list[Any]] | None = None  # with the loader that it comes from
        self.order = RowOrder(self.collated)
        """Finds the row of each record in a batch."""
        self._unrepeated: Any = None  # the dataset whose records are known to have one position each
        self.labels: list[Any] = []
        """Whole numbers and words of a few records, at the beginning of the last pass."""

    @property
    def loader(self) -> PrivateDataLoader:
        """The current private loader."""
        return self._loader()

    def take(self, num: int, seed: int = 0) -> list[Any]:
        """Return records from all over a dataset with random access, or the first records of a stream.

        The positions are pseudo-random and always the same for a seed, so that neither sorted nor periodic data makes
        the records alike.

        Args:
            num: number of records; all of them if the dataset has fewer.
            seed: chooses the positions.
        """
        loader = self.loader
        with self._aside():
            if isinstance(loader.dataset, IterableDataset):
                return peek_samples(loader, num)
            return read(loader.dataset, self._positions(num, seed))

    def read(self, positions: list[int]) -> list[Any]:
        """Return the records at some positions of a dataset with random access."""
        return read(self.loader.dataset, positions)

    def check_reading(self, seed: int) -> None:
        """Check that an item of a dataset with random access is the same whatever else is read, made of one record, and
        at one position; and that a batch does not depend on the batches before it.

        Raises:
            PrivacyError: an item or a batch changes with others, random draws decide of which records an item is made,
                or a record has several positions.
        """
        dataset = self.loader.dataset
        if isinstance(dataset, IterableDataset):
            return
        if is_own(collate := user_collate(self.loader)) and (self._num_records or 0) > 2:
            check_collating(collate, partial(collate_samples, self.loader), self.take(3, seed))
        if not is_plain(dataset):
            check_reading(dataset, self._positions(3, seed))
            check_partners(dataset, self._positions(3, seed))
            if self._unrepeated is not dataset and self.loader.facts.unit != "user":
                check_repeats(dataset)
                self._unrepeated = dataset

    def check_order(self) -> None:
        """Check, at the beginning of a pass, that the records are where they were, by their whole numbers and words.

        Raises:
            PrivacyError: a quarter of a few records has others, which no random draw explains.
        """
        if isinstance(self.loader.dataset, IterableDataset):
            return
        labels = self._steady(whole_numbers)
        moved = sum(old != new for old, new in zip(self.labels, labels, strict=False) if None not in (old, new))
        self.labels = labels
        if 4 * moved >= len(labels):
            raise PrivacyError(
                f"Expected records to keep their positions, got other whole numbers or words at {moved} of "
                f"{len(labels)} positions in a new pass. Whose a record is, and when it comes back, was settled by its "
                "position: shuffle nothing in place, and keep the dataset."
            )

    def marks(self) -> list[float]:
        """Return numbers that tell apart what this rank trains on; ranks compare them, see ``check_ranks``.

        The first is 1 for a stream and 0 for a dataset; the second marks which records belong to one user. The others
        mark records at a few positions; 0 if there is none, or if random draws change it.
        """
        loader = self.loader
        if isinstance(loader.dataset, IterableDataset):
            found = [mark_of(_features(record)) for record in self.take(_NUM_PLACES // 4)]
            return [1.0, 0.0, *found, *[0.0] * (_NUM_PLACES - len(found))]
        same = [mark or 0.0 for mark in self._steady(lambda record: mark_of(_features(record)))]
        units = getattr(loader.batch_sampler, "units", None)
        users = 0.0 if units is None else mark_of(units.owners.tobytes())
        return [0.0, users, *same, *[0.0] * (_NUM_PLACES - len(same))]

    def _steady(self, look: Callable[[Any], Any]) -> list[Any]:
        """Return what is seen in a few records, always the same ones; None where random draws change it."""
        readings = []
        for entropy in (1, 2):
            with fresh_randomness(entropy), self._aside():
                records = read(self.loader.dataset, self._positions(_NUM_PLACES, 1))
                readings.append([look(record) for record in records])
        return [one if one == other else None for one, other in zip(*readings, strict=True)]

    def _positions(self, num: int, seed: int) -> list[int]:
        size = self._num_records or 0
        return [int(each) for each in np.random.default_rng(seed).choice(size, size=min(num, size), replace=False)]

    def learn_rows(self, device: torch.device) -> None:
        """Find the tensors of a collated batch that have one row per record, and store their paths in ``axes``.

        Args:
            device: its global generator and those of the CPU are restored.
        """
        with kept_generators(device), self._aside():
            # of flat lists of parts, few records may have one each; of unlike ones, the collate function may drop one
            for num in (_NUM_PLACES, 2):
                pair = (differing(self.take(num)) * 2)[:2]
                two, three = (self.collated((pair * size)[:size]) for size in (2, 3))
                self.axes = checks.sample_axes(two, three)
                if self.axes:
                    break

    def batch_of(self, records: list[Any], *, on_trial: bool = False) -> Any:
        """Return records collated and moved to the device.

        Args:
            records: of the batch.
            on_trial: whether what the collate function keeps is left as it is now, until the sandbox puts it back.

        Raises:
            PrivacyError: the collate function drops or adds records.
        """
        batch = self._collated(records) if on_trial else self.collated(records)
        checks.check_rows(batch, len(records), self.axes)
        return self.move(batch)

    def collated(self, records: list[Any]) -> Any:
        """Return records collated, by a collate function whose state is restored."""
        restore = self.kept()
        try:
            return self._collated(records)
        finally:
            restore()

    def _collated(self, records: list[Any]) -> Any:
        if isinstance(records, Collated):
            return copy.deepcopy(records.batch)
        if isinstance(records, Reread):
            num, found = len(records), self.read(records.positions)
            parts = [found[max(0, end - num) : end] for end in range(len(found), 0, -num)]
            return [collate_samples(self.loader, part) for part in reversed(parts)][-1]
        return collate_samples(self.loader, apart(records))

    def follow_order(self) -> bool:
        """Look from here on for the row of each record, if the user's function collates them; return False if that is
        not new, or if positions say whose a record is.
        """
        is_new = not self.order.is_followed and self.loader.facts.unit != "user" and is_own(user_collate(self.loader))
        self.order.is_followed |= is_new
        return is_new

    def kept(self) -> Callable[[], None]:
        """Take note of what the collate function keeps, and return a function that puts it back."""
        return KeptState(user_collate(self.loader)).put_back

    def stand_in(self, copies: int = 1) -> Any:
        """Return a batch on the device that replaces an empty one: one record, or copies of it."""
        if self._stand_in is None or self._stand_in[0] is not self.loader:
            with self._aside():
                self._stand_in = self.loader, peek_samples(self.loader, 1)
        return self.batch_of(self._stand_in[1] * copies)

    def batch_size(self, world_size: int, limit: int | None) -> int:
        """Return the expected number of records in a real microbatch of one rank, at most the dataset size.

        Args:
            world_size: ranks.
            limit: the ``microbatch_size`` of the settings.
        """
        facts, each = self.loader.facts, self.loader.facts.records_per_unit or 1
        drawn = max(1, facts.expected_batch_size // (world_size * facts.accumulate)) * each
        return min(drawn, limit or drawn, self._num_records or drawn)

    def drawn_size(self, world_size: int, limit: int | None, seed: int) -> int:
        """Return a number of records that a real microbatch of one rank may hold; it is public.

        Under Poisson sampling it follows from the seed as real sizes do by chance; for seed 0 it is two standard
        deviations above the expected one. A record of the training set is left to be exchanged, if there is one.

        Args:
            world_size: ranks.
            limit: the ``microbatch_size`` of the settings.
            seed: chooses the size.
        """
        expected = self.batch_size(world_size, None)
        if self.loader.facts.sampling != "poisson":
            return self.batch_size(world_size, limit)
        size = expected + round(2 * expected**0.5) if seed == 0 else np.random.default_rng(seed).poisson(expected)
        most = max(self.batch_size(world_size, limit), min(limit or size, (self._num_records or size) - 1))
        return min(max(2, int(size)), most)

    @property
    def _num_records(self) -> int | None:
        """Number of records of the training set; None if unknown."""
        facts = self.loader.facts
        return dataset_length(self.loader.dataset) if facts.unit == "user" else facts.dataset_size


def _features(record: Any) -> list[Any]:
    """Return the numbers of a record, those that are not whole to four digits, at most 64 of each array.

    Words count only if there are no numbers: they may be paths, which differ between machines.
    """
    words = whole_numbers(record)
    found = [each for each in words if not isinstance(each, str)]
    for leaf in tree_leaves(record):
        if isinstance(leaf, np.floating) or has_floats(leaf):
            values = np.asarray(leaf.detach().cpu().float() if isinstance(leaf, Tensor) else leaf).reshape(-1)[:64]
            found.extend(f"{value:.4g}" for value in values)
    return found or words
