"""Wrappers between torch's loader and the user's dataset, which read and collate an item in the loading process."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from lightning_dp.sampling.batches import LogicalBatch, MicrobatchCollate
from lightning_dp.sampling.indices import Draw
from lightning_dp.sampling.randomness import fresh_randomness


def as_it_is(batch: Any) -> Any:
    """Return an already collated batch unchanged."""
    return batch


def reads_many(dataset: Any) -> bool:
    """Tell whether a ``DataLoader`` reads a whole list of indices from this dataset at once."""
    return bool(getattr(dataset, "__getitems__", None))


def is_whole(dataset: Any) -> bool:
    """Tell whether a dataset is one object with a row per record, such as a ``TensorDict``, whose rows ``torch.stack``
    joins again.
    """
    return reads_many(dataset) and hasattr(dataset, "unbind")


def read(dataset: Any, indices: list[int]) -> list[Any]:
    """Return the samples at these indices; no dataset is called with an empty list.

    Raises:
        TypeError: a dataset that reads many samples at once did not return one sample per index, so they cannot be
            distinguished.
    """
    if not indices:
        return []
    if not reads_many(dataset):
        return [dataset[index] for index in indices]
    samples = dataset.__getitems__(indices)
    if is_whole(dataset) and len(samples) == len(indices):
        return list(samples.unbind(0))
    if not isinstance(samples, (list, tuple)) or len(samples) != len(indices):
        raise TypeError(
            f"Expected a list with one sample an index from {type(dataset).__name__}.__getitems__, got "
            f"{type(samples).__name__} for {len(indices)} indices. A private batch is cut into microbatches before "
            "it is collated: return a list of samples and build the batch in `collate_fn`."
        )
    return list(samples)


_OWN = frozenset(("_dataset", "_collate"))
"""Attributes of a wrapper itself, not of its dataset."""


class _Before:
    """A wrapper that replaces the dataset in a loader's iterator, and otherwise behaves like the dataset.

    Class, length, items and attributes are the dataset's, so a ``worker_init_fn`` that prepares
    ``get_worker_info().dataset`` still works.
    """

    _own = _OWN
    _dataset: Any
    _collate: MicrobatchCollate

    def __init__(self, dataset: Any, collate: MicrobatchCollate) -> None:
        self._dataset = dataset
        self._collate = collate

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._dataset.__class__

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name in self._own:  # a copy being built has no state yet
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            object.__setattr__(self, name, value)
        else:
            setattr(self._dataset, name, value)


class BeforeRecords(_Before):
    """A wrapper of a map-style dataset that reads and collates one item at a time, with fresh randomness.

    **Guarantee**: see ``fresh_randomness``; the entropy comes from the item's ``Draw``.

    Args:
        dataset: map-style dataset, or a ``Gather`` of its rows.
        collate: collate function that makes the microbatches.
        draws: whether user code, which may draw random numbers, reads or collates; False skips fresh randomness.
    """

    _own = _OWN | {"_draws"}
    _draws: bool

    def __init__(self, dataset: Any, collate: MicrobatchCollate, *, draws: bool = True) -> None:
        super().__init__(dataset, collate)
        self._draws = draws

    def __getitems__(self, draw: Draw) -> LogicalBatch:
        with fresh_randomness(draw.entropy) if self._draws else nullcontext():
            batch = self._collate(read(self._dataset, draw), draw.sizes, alone=draw.alone)
        if self._draws and self._collate.watch is not None:
            self._collate.watch.read(self._dataset, [*dict.fromkeys(draw)])
        batch.draw = draw
        return batch

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(BeforeRecords, draws=self._draws), (self._dataset, self._collate)


class BeforeStream(_Before):
    """A wrapper of an iterable dataset that reads and collates each item with fresh randomness.

    The loader reads ``batch_size`` records one by one and then calls ``collate``. The randomness of an item begins with
    the first record and ends with ``collate``, or when the stream ends or raises.

    **Guarantee**: see ``fresh_randomness``; the entropy is the operating system's, or depends on the seed, the worker
    and the number of the item.

    Args:
        dataset: iterable dataset.
        collate: collate function that makes the microbatches.
        batch_size: number of records in an item.
        seed: seed of the entropy, for tests; ``None``: the operating system's entropy.
    """

    _own = _OWN | {"_batch_size", "_seed", "_num_items", "_scope"}
    _batch_size: int
    _seed: tuple[int, ...] | None
    _num_items: int
    _scope: ExitStack | None

    def __init__(
        self, dataset: Any, collate: MicrobatchCollate, *, batch_size: int, seed: tuple[int, ...] | None
    ) -> None:
        super().__init__(dataset, collate)
        self._batch_size, self._seed = batch_size, seed
        self._num_items, self._scope = 0, None

    def __iter__(self) -> Iterator[Any]:
        with fresh_randomness(self._entropy()):
            records = iter(self._dataset)
        for number in itertools.count():
            if number % self._batch_size == 0:
                self._begin()
            try:
                record = next(records)
            except StopIteration:
                self._end()
                return
            except BaseException:
                self._end()
                raise
            yield record

    def collate(self, samples: list[Any]) -> LogicalBatch:
        """Return the logical batch of the given records, and end their random streams."""
        if self._scope is None:  # a shorter last item: the end of the stream has ended its randomness
            self._begin()
        try:
            return self._collate(samples)
        finally:
            self._end()

    def _begin(self) -> None:
        self._scope = ExitStack()
        self._scope.enter_context(fresh_randomness(self._entropy()))

    def _end(self) -> None:
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.close()

    def _entropy(self) -> int:
        if self._seed is None:
            return secrets.randbits(128)
        self._num_items += 1
        worker = get_worker_info()
        key = (*self._seed[1:], 0 if worker is None else worker.id, self._num_items)
        words = np.random.SeedSequence(self._seed[0], spawn_key=key).generate_state(4)
        return int.from_bytes(words.tobytes(), "little")

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(BeforeStream, batch_size=self._batch_size, seed=self._seed)
        return make, (self._dataset, self._collate)
