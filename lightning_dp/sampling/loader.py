"""The private loader: a torch ``DataLoader`` whose items are ``LogicalBatch`` objects, built in ``make.py``."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling.batches import LogicalBatch, MicrobatchCollate
from lightning_dp.sampling.checks import check_count
from lightning_dp.sampling.facts import SamplingFacts
from lightning_dp.sampling.fetch import BeforeRecords, BeforeStream, as_it_is
from lightning_dp.sampling.first_rows import FirstRows
from lightning_dp.sampling.gather import Gather
from lightning_dp.sampling.indices import CyclicBatchSampler

#: Of these the generator seeds the workers; the private draws do not use it.
_KEPT = (
    "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers", "pin_memory_device",
)  # fmt: skip


def kept_options(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the arguments of a user's loader that do not affect the composition of batches."""
    return {name: getattr(loader, name) for name in _KEPT if name in inspect.signature(DataLoader).parameters}


class PrivateDataLoader(DataLoader[Any]):
    """A ``DataLoader`` that yields ``LogicalBatch`` objects; ``private_dataloader`` makes one.

    ``loader.dataset`` is the user's own object. The user's code reads and collates each item under random streams with
    fresh entropy (see ``fresh_randomness``), in workers and in this process, whose own streams are not affected.
    ``state_dict`` is empty on purpose: draws after a resume use fresh randomness, and no checkpoint holds anything that
    depends on data. Because the method exists, Lightning can resume the loader.

    Args:
        dataset: the user's dataset.
        facts: public facts about the sampling.
        batch_size: the user's batch size: expected number of units in an item.
        seed: for tests: determines the random streams for items of an iterable dataset.
        kwargs: arguments of ``torch.utils.data.DataLoader``.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        facts: SamplingFacts,
        batch_size: int | None,
        seed: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        options: dict[str, Any] = kwargs if "batch_sampler" in kwargs else {**kwargs, "batch_size": batch_size}
        super().__init__(dataset, **options)
        self.__dict__["batch_size"] = batch_size  # torch would keep None with a batch sampler
        self.facts = facts
        self.before_pass: Callable[[], None] | None = None
        self.before_item: Callable[[], Callable[[], Mapping[Any, Any]]] | None = None
        """Called before code of the user's reads the records of an item in this process; it returns a function that
        returns what this has changed.
        """
        self.position = 0  # logical batches handed out so far, where their order matters: a public number
        self._seed = seed
        self._first = 0  # the position at which the assignment of this loader began
        self._num_passes = 0
        self._num_skipped = 0
        self._pass_length: int | None = None  # logical batches of a pass over a stream whose order is accounted for

    def draw_as(self, other: PrivateDataLoader) -> None:
        """Use the sampling of another loader over the same dataset, from the next pass on."""
        self.facts = other.facts
        self.__dict__["batch_sampler"] = other.batch_sampler

    def one_by_one(self, batch: LogicalBatch) -> LogicalBatch:
        """Return an item cut into microbatches of one unit each, and cut so whatever is drawn from here on.

        An item that was collated in larger ones is read again, in this process and under the same randomness.

        Args:
            batch: an item of this loader.

        Raises:
            PrivacyError: the item of a stream, which cannot be read again.
        """
        if all(count == 1 for count, _ in batch.microbatches):
            return batch
        if batch.draw is None:
            raise PrivacyError(
                "Expected a dataset with random access where samples are to run one at a time, got a stream, whose "
                "records cannot be read again. Pass grad_sample='single' from the start."
            )
        batch.draw.alone = self.batch_sampler.alone = True  # type: ignore[union-attr]
        assert isinstance(self.collate_fn, MicrobatchCollate)
        changes = dict if self.before_item is None else self.before_item()
        again = BeforeRecords(self.dataset, self.collate_fn).__getitems__(batch.draw)
        again.position, again.changed = batch.position, changes()
        return again

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.before_pass is not None:
            self.before_pass()
        return self._in_order() if self._is_ordered else self._items()

    def start_at(self, step: int, *, steps_per_pass: int | None = None) -> None:
        """Continue with the logical batch of step ``step``; a resumed run must call this before it reads.

        This changes nothing for "poisson", and for "shuffle" with random access, because their draws have no order.

        **Guarantee**: records are used again at the separation that ``facts`` states, or an error is raised. "cyclic"
        takes the group of that step, in mid-pass only if the assignment is known (public, or from this process). A
        stream in a fixed order is read up to that step, and these records are dropped.

        Args:
            step: number of logical steps released so far, >= 0.
            steps_per_pass: length of a pass over a stream that is cut short on purpose; default: the stream's own.

        Raises:
            PrivacyError: the order cannot continue at that step.
        """
        check_count("step", step, 0)
        if isinstance(self.batch_sampler, CyclicBatchSampler):
            self._start_cycle_at(step, self.batch_sampler)
        elif isinstance(self.dataset, IterableDataset):
            if step > 0 and not self.facts.fixed_order:
                raise PrivacyError(
                    f"The stream begins with its first record, but {step} steps of the run are done. Its records would "
                    "come back sooner than accounted for. Promise fixed_order=True if every pass has the same order, "
                    "so that it can be read up to there."
                )
            length = steps_per_pass or self.facts.separation
            self._num_skipped = (step % length if length else step) * self.facts.accumulate
            self._pass_length = length
        self.position = step

    def _start_cycle_at(self, step: int, sampler: CyclicBatchSampler) -> None:
        done = step % sampler.steps_per_epoch
        if sampler.reproducible or self._first <= step <= self.position:
            return
        if done:
            raise PrivacyError(
                f"Step {step} is {done} steps into a pass of {sampler.steps_per_epoch}, and the secret assignment of "
                "that pass ended with its process. Records would come back sooner than accounted for. Resume from a "
                'checkpoint between two passes, or train with neighboring_relation="zero_out", whose assignment is '
                "public."
            )
        self._first = step

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: draws are fresh after a resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept any state and ignore it: draws are fresh after a resume."""

    @property
    def _is_ordered(self) -> bool:
        return isinstance(self.dataset, IterableDataset) or isinstance(self.batch_sampler, CyclicBatchSampler)

    def _in_order(self) -> Iterator[LogicalBatch]:
        """Yield the items of a pass from ``position`` on, and advance ``position`` by items yielded, not read ahead."""
        if isinstance(self.batch_sampler, CyclicBatchSampler):
            self.batch_sampler.position = self.position
        items = self._items()
        num_skipped, self._num_skipped = self._num_skipped, 0
        done = self.position % self._pass_length if self._pass_length else 0
        if self._pass_length and num_skipped != done * self.facts.accumulate:
            raise PrivacyError(
                f"The stream began again {done} steps into a pass of {self._pass_length}. Its records would come back "
                "sooner than accounted for. Let it yield as many records as its length says, and take a step for each "
                "of its batches."
            )
        if sum(1 for _ in itertools.islice(items, num_skipped)) < num_skipped:
            raise PrivacyError(
                f"The stream ended before item {num_skipped}, where the run stopped. It does not yield what it yielded "
                "then: resume on the same data."
            )
        for number, item in enumerate(items, start=num_skipped):
            if number % self.facts.accumulate == 0:
                self.position += 1
            item.position = self.position - 1
            yield item

    def _items(self) -> Iterator[LogicalBatch]:
        dataset, collate = self.dataset, self.collate_fn
        assert isinstance(collate, MicrobatchCollate)
        self._num_passes += 1
        rows: Gather | None = None
        # The iterator and its workers use these two; the loader's attributes stay the user's own.
        if isinstance(dataset, IterableDataset):
            assert self.batch_size is not None
            seed = None if self._seed is None else (*self._seed, self._num_passes)
            stream = BeforeStream(dataset, collate, batch_size=self.batch_size, seed=seed)
            self.__dict__["dataset"], self.__dict__["collate_fn"] = stream, stream.collate
        else:
            rows = Gather.of(dataset, collate.collate_fn) if self.num_workers == 0 else None
            self.__dict__["collate_fn"] = as_it_is
            self.__dict__["dataset"] = (
                BeforeRecords(dataset, collate)
                if rows is None
                else BeforeRecords(rows, collate.replaced(rows.collate), draws=False)
            )
        try:
            items: Iterator[LogicalBatch] = super().__iter__()
            if isinstance(dataset, IterableDataset):
                items = self._compared(items)
            return self._noted(items) if self.num_workers == 0 and rows is None else items
        finally:
            self.__dict__["dataset"], self.__dict__["collate_fn"] = dataset, collate

    def _noted(self, items: Iterator[LogicalBatch]) -> Iterator[LogicalBatch]:
        while True:
            changes = dict if self.before_item is None else self.before_item()
            if (item := next(items, None)) is None:
                return
            item.changed = changes()
            yield item

    def _compared(self, items: Iterator[LogicalBatch]) -> Iterator[LogicalBatch]:
        first = FirstRows(self.num_workers)
        for item in items:
            first.see(item)
            yield item
