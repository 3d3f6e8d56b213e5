"""One item of a private loader: samples, collated in microbatches that fit on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data._utils import pin_memory as _pinning
from typing_extensions import Self

Collate = Callable[[list[Any]], Any]
_pin: Callable[[Any], Any] = _pinning.pin_memory
_FOREIGN = (
    "Expected a batch of your own loader, got one that the private loader draws for a training step: it holds "
    "microbatches of the records drawn. Read examples from your own DataLoader, such as "
    "trainer.datamodule.train_dataloader(), in place of trainer.train_dataloader."
)


class LogicalBatch:
    """The samples of one item of a private loader, collated in microbatches.

    An item is one logical batch, or one of its ``accumulate`` parts. An empty item is falsy. It occurs with Poisson
    sampling and is not an error: the step is taken and counted.

    The class is deliberately not a sequence: code that traverses nested collections (device transfer, inference of
    batch sizes) sees one opaque object, and each microbatch moves to the device only when it is used.

    **Guarantee**: a user's records are all in one microbatch. The number of samples, their owners and the samples are
    private.

    Args:
        microbatches: pairs (number of units >= 1, the batch as the user's ``collate_fn`` made it). A unit is a record,
            or a user with some records.
        owners: for each microbatch, an int64 tensor of shape (records,): the position 0 ... units - 1 of the user to
            whom each record belongs, ascending. ``None`` if units are records, for one microbatch or for all.

    Example:
        >>> batch = LogicalBatch([(2, "ab"), (1, "c")])
        >>> len(batch), batch.num_samples, batch.owners, bool(LogicalBatch([]))
        (2, 3, [None, None], False)
    """

    __slots__ = ("changed", "draw", "exchanged", "joined", "microbatches", "owners", "position", "read")

    def __init__(self, microbatches: Sequence[tuple[int, Any]], owners: Sequence[Tensor | None] | None = None) -> None:
        self.microbatches = list(microbatches)
        self.owners: list[Tensor | None] = [None] * len(self.microbatches) if owners is None else list(owners)
        self.position: int | None = None  # of the logical batch in the order of the data, where that matters; public
        self.exchanged: Any = None  # the last microbatch with one record exchanged, see ``LoadingWatch``; private
        self.joined: frozenset[int | tuple[int, ...]] = frozenset()  # see ``GradientEngine``; private
        self.read: list[set[Any]] = [set() for _ in self.microbatches]  # values that user code has read; private
        self.changed: Mapping[Any, Any] = {}  # what loading it has changed in this process, as it was before; private
        self.draw: Any = None  # the indices that it was read at, where the dataset has random access; private

    @property
    def parts(self) -> list[tuple[int, Tensor | None, Any]]:
        """Number of records, owners of the records, and collated batch of every microbatch (private)."""
        return [
            (count if owners is None else len(owners), owners, batch)
            for (count, batch), owners in zip(self.microbatches, self.owners, strict=True)
        ]

    @property
    def positions(self) -> list[list[int]]:
        """Positions in the dataset of the records of every microbatch; each empty if unknown (private)."""
        sizes = [size for size, _, _ in self.parts]
        ends = [*itertools.accumulate(sizes)]
        drawn = list(self.draw) if self.draw else []
        return [drawn[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    @property
    def num_samples(self) -> int:
        """Number of units over all microbatches (private)."""
        return sum(count for count, _ in self.microbatches)

    def __len__(self) -> int:
        return len(self.microbatches)

    def __getitem__(self, key: Any) -> Any:  # Python also unpacks by it
        raise TypeError(_FOREIGN)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name if name.startswith("_") else _FOREIGN)

    def __repr__(self) -> str:
        return f"LogicalBatch(num_samples={self.num_samples}, num_microbatches={len(self)})"

    def pin_memory(self) -> LogicalBatch:
        """Return the same batch with every tensor in page-locked memory; a ``DataLoader`` calls this."""
        pinned = LogicalBatch([(count, _pin(batch)) for count, batch in self.microbatches], _pin(self.owners))
        return pinned.drawn_like(self)

    def drawn_like(self, other: LogicalBatch) -> Self:
        """Take over what is known of another batch of the same records, and return this one."""
        self.position, self.draw, self.exchanged = other.position, other.draw, other.exchanged
        self.joined, self.read, self.changed = other.joined, other.read, other.changed
        return self


class Stacked:
    """A collate function for the records of a dataset that gives a loader its rows as one object.

    Args:
        collate_fn: the user's, from such an object to a batch.
    """

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch of these samples."""
        return self.collate_fn(torch.stack(samples))


class Watch(Protocol):
    """An object that watches how records are read and collated; see ``LoadingWatch``."""

    def read(self, dataset: Any, positions: list[int]) -> None:
        """Check that items depend on nothing else that is read."""

    def collate(self, function: Collate, records: list[Any]) -> tuple[Any, Any]:
        """Return a collated batch, and one with an exchanged record or None."""

    def reading(self, function: Collate) -> AbstractContextManager[Any]:
        """Return a context in which the values that a collate function reads are noted; it yields None, or an object
        whose ``take`` returns them.
        """

    def check(self, function: Collate, records: list[Any], batch: Any) -> None:
        """Check that indices in a collated batch name what is of the same record."""

    def unequal(self, function: Collate, records: list[Any]) -> Callable[[Any], set[int | tuple[int, ...]]]:
        """Return, before records are collated, a function that returns the lengths at which the collated batch joins
        unequal parts of them.
        """


class MicrobatchCollate:
    """A collate function that cuts samples into microbatches and collates each with the user's function.

    There are m = ceil(samples / microbatch_size) microbatches, whose sizes differ by one at most. Users with several
    records are never split: each microbatch takes users until the next user would exceed the size, and a user with more
    records gets a microbatch alone. An empty list gives an empty ``LogicalBatch`` without a call of the user's
    function.

    Args:
        collate_fn: the user's function from a list of samples to a batch.
        microbatch_size: largest number of records in a microbatch, >= 1; ``None`` for one microbatch.
        watch: collates the last microbatch, and looks at what the function mixes.
    """

    def __init__(self, collate_fn: Collate, microbatch_size: int | None, watch: Watch | None = None) -> None:
        self.collate_fn = collate_fn
        self.microbatch_size = microbatch_size
        self.watch = watch

    def replaced(self, collate_fn: Collate) -> MicrobatchCollate:
        """Return the same cuts with another collate function."""
        return MicrobatchCollate(collate_fn, self.microbatch_size, self.watch)

    def __call__(self, samples: list[Any], sizes: list[int] | None = None, *, alone: bool = False) -> LogicalBatch:
        """Return the logical batch of these samples.

        Args:
            samples: records, grouped by user.
            sizes: number of records of each user, >= 1; ``None`` if each record is a unit.
            alone: whether each unit is a microbatch of its own, whatever ``microbatch_size`` is.
        """
        if not samples:
            return LogicalBatch([])
        counts = [1] * len(samples) if sizes is None else sizes
        assert sum(counts) == len(samples)
        starts = [0, *itertools.accumulate(counts)]
        microbatches: list[tuple[int, Any]] = []
        owners: list[Tensor | None] = []
        read: list[set[Any]] = []
        exchanged, joined = None, set[int | tuple[int, ...]]()
        for first, last in itertools.pairwise(self._cuts(counts, 1 if alone else self.microbatch_size)):
            chosen = samples[starts[first] : starts[last]]
            lengths = None if self.watch is None else self.watch.unequal(self.collate_fn, chosen)
            hears = None if self.watch is None or last - first == 1 else self.watch.reading(self.collate_fn)
            with hears or nullcontext() as reading:
                if self.watch is None or last < len(counts):
                    batch = self.collate_fn(chosen)
                else:
                    batch, exchanged = self.watch.collate(self.collate_fn, chosen)
            read.append(set() if reading is None else reading.take())
            if self.watch is not None and lengths is not None:
                self.watch.check(self.collate_fn, chosen, batch)
                joined |= lengths(batch)
            microbatches.append((last - first, batch))
            repeats = None if sizes is None else torch.tensor(sizes[first:last])
            owners.append(None if repeats is None else torch.repeat_interleave(repeats))
        collated = LogicalBatch(microbatches, owners)
        collated.exchanged, collated.joined, collated.read = exchanged, frozenset(joined), read
        return collated

    @staticmethod
    def _cuts(counts: list[int], most: int | None) -> list[int]:
        """Return the positions, counted in units, at which microbatches begin, and the total number of units."""
        units, records = len(counts), sum(counts)
        if most is None:
            return [0, units]
        if units == records:
            parts = -(-units // most)
            return [units * part // parts for part in range(parts + 1)]
        cuts, filled = [0], 0
        for unit, count in enumerate(counts):
            if filled and filled + count > most:
                cuts.append(unit)
                filled = 0
            filled += count
        return [*cuts, units]
