"""LogicalBatches: the loader of the user's own loop; each logical batch can be used once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import IterableDataset

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling import LogicalBatch, PrivateDataLoader, SamplingFacts


class DrawnBatch(LogicalBatch):
    """A logical batch with a reference to its loader and its pass over the data.

    Args:
        take: takes a batch from the private loader.
        source: the loader.
        number: number of the pass.
    """

    __slots__ = ("number", "source", "take", "used")

    def __init__(self, take: Callable[[], LogicalBatch], source: object, number: int) -> None:
        self.take: Callable[[], LogicalBatch] | None = take
        self.source, self.number, self.used = source, number, False

    def load(self) -> None:
        """Take the batch from the private loader, unless this was done; the first look at any field does it, too."""
        if self.take is not None:
            batch, self.take = self.take(), None
            super().__init__(batch.microbatches, batch.owners)
            self.drawn_like(batch)

    def __iter__(self) -> Iterator[Any]:
        """Refuse to unpack the batch.

        Raises:
            TypeError: always.
        """
        raise TypeError(_opaque("unpack it"))

    def __getitem__(self, key: Any) -> Any:
        """Refuse to take a part of the batch.

        Raises:
            TypeError: always.
        """
        raise TypeError(_opaque(f"take [{key!r}] of it"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to copy the batch, whose records would count twice.

        Raises:
            TypeError: always.
        """
        raise TypeError(_opaque("copy it"))

    def __getattr__(self, name: str) -> Any:
        """Refuse methods and fields of the user's batch, such as ``batch.to(device)``.

        Raises:
            AttributeError: always.
        """
        if name in LogicalBatch.__slots__ and self.take is not None:  # not taken yet
            self.load()
            return getattr(self, name)
        raise AttributeError(_opaque(f"take .{name} of it"))


def _itself(batch: LogicalBatch) -> LogicalBatch:
    return batch


def _opaque(attempt: str) -> str:
    return (
        f"Expected the batch of a private loader whole, got an attempt to {attempt}. Pass it to step or backward: "
        "your loss function gets its records, in microbatches."
    )


class LogicalBatches:
    """An iterable of privately drawn logical batches; each iteration is one pass over the data.

    An item is opaque and is made for one step. The pass ends early at the last step that the run may take. If this
    process reads the records, those of the first step are read within the step, which watches what this sets.

    **Guarantee**: none of its own. Sizes and members of batches are private; the number of batches per pass is public.

    Args:
        loader: draws the batches.
        steps_left: returns the number of steps that the run may still take.
        begin: called when a pass begins.
    """

    def __init__(
        self, loader: PrivateDataLoader, steps_left: Callable[[], float], begin: Callable[[], None] = lambda: None
    ) -> None:
        self._loader, self._steps_left, self._begin = loader, steps_left, begin
        self._numbers = itertools.count()
        self._current = -1

    def __iter__(self) -> Iterator[DrawnBatch]:
        number = next(self._numbers)
        self._begin()
        items = iter(self._loader)
        can_wait = self._loader.num_workers == 0 and not isinstance(self._loader.dataset, IterableDataset)
        for position in itertools.count():
            if position and self._steps_left() == 0:
                return
            if can_wait and self._loader.before_item is None and position < len(self):
                yield DrawnBatch(partial(next, items), self, number)
            elif (batch := next(items, None)) is not None:
                yield DrawnBatch(partial(_itself, batch), self, number)
            else:
                return

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def facts(self) -> SamplingFacts:
        """Public facts about the sampling."""
        return self._loader.facts

    @property
    def dataset(self) -> Any:
        """The user's dataset."""
        return self._loader.dataset

    def use(self, batch: Any) -> bool:
        """Mark a batch as used, and tell whether another pass over the data begins with it.

        Raises:
            TypeError: not a batch of a private loader.
            PrivacyError: a batch of another loader, or one that was used already.
        """
        if not isinstance(batch, LogicalBatch):
            raise TypeError(
                f"Expected a batch of the private loader, got {type(batch).__name__}. Iterate over the loader that "
                "this run made, since epsilon is computed for its way of drawing."
            )
        if not isinstance(batch, DrawnBatch) or batch.source is not self:
            raise PrivacyError(
                "Expected a batch that this run's loader drew, got one of another loader. Epsilon would be computed "
                "for other draws than those used: iterate over this run's loader."
            )
        if batch.used:
            raise PrivacyError(
                "This batch was used for a step already, so its records would count twice while the ledger assumes "
                "fresh draws. Take the next batch of the loader."
            )
        batch.used = True
        begins, self._current = batch.number != self._current, batch.number
        return begins
