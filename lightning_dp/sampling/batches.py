"""One item of a private loader: some samples, collated in microbatches that are small enough for the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data._utils import pin_memory as _pinning

Collate = Callable[[list[Any]], Any]
_pin: Callable[[Any], Any] = _pinning.pin_memory


class LogicalBatch:
    """The samples of one item of a private loader, already collated in microbatches.

    An item is one logical batch, or one of its ``accumulate`` parts. It is falsy when no sample was drawn, which
    happens with Poisson sampling and is not an error: the step is taken and counted all the same.

    The class is deliberately not a sequence: whatever walks through nested collections (device transfer, guessing of
    batch sizes) sees one opaque object, and microbatches move to the device one at a time, when they are used.

    **Guarantee**: none by itself. How many samples there are, and which, is private.

    Args:
        microbatches: pairs (number of samples >= 1, the batch as the user's ``collate_fn`` made it).

    Example:
        >>> batch = LogicalBatch([(2, "ab"), (1, "c")])
        >>> len(batch), batch.num_samples, bool(LogicalBatch([]))
        (2, 3, False)
    """

    __slots__ = ("microbatches",)

    def __init__(self, microbatches: Sequence[tuple[int, Any]]) -> None:
        self.microbatches = list(microbatches)

    @property
    def num_samples(self) -> int:
        """Number of samples over all microbatches (private)."""
        return sum(count for count, _ in self.microbatches)

    def __len__(self) -> int:
        return len(self.microbatches)

    def __repr__(self) -> str:
        return f"LogicalBatch(num_samples={self.num_samples}, num_microbatches={len(self)})"

    def pin_memory(self) -> LogicalBatch:
        """Return the same batch with every tensor in page-locked memory; a ``DataLoader`` calls this."""
        return LogicalBatch([(count, _pin(batch)) for count, batch in self.microbatches])


class MicrobatchCollate:
    """Cut a list of samples into microbatches of almost equal size and collate each with the user's function.

    With m = ceil(samples / microbatch_size) microbatches, sizes differ by one at most. No sample, no call: an empty
    list gives an empty ``LogicalBatch`` and the user's function never sees it.

    Args:
        collate_fn: the user's function from a list of samples to a batch.
        microbatch_size: largest number of samples in a microbatch, >= 1; ``None`` for one microbatch.
    """

    def __init__(self, collate_fn: Collate, microbatch_size: int | None) -> None:
        self.collate_fn = collate_fn
        self.microbatch_size = microbatch_size

    def __call__(self, samples: list[Any]) -> LogicalBatch:
        if not samples:
            return LogicalBatch([])
        total = len(samples)
        parts = 1 if self.microbatch_size is None else -(-total // self.microbatch_size)
        edges = [total * part // parts for part in range(parts + 1)]
        return LogicalBatch(
            [(stop - start, self.collate_fn(samples[start:stop])) for start, stop in itertools.pairwise(edges)]
        )


def reads_many(dataset: Any) -> bool:
    """Whether ``DataLoader`` would read a whole list of indices at once from this dataset."""
    return bool(getattr(dataset, "__getitems__", None))


class NonEmptyGetitems:
    """Stands before a dataset that reads many samples at once, so that it is never asked for none.

    ``DataLoader`` hands the whole index list to ``dataset.__getitems__`` where a dataset has it, the empty list of an
    empty Poisson batch too, and few datasets expect that. Attributes are read from and written to the user's dataset,
    so a ``worker_init_fn`` that prepares ``get_worker_info().dataset`` still works.

    Args:
        dataset: map-style dataset with ``__getitems__``.

    Raises:
        TypeError: the dataset did not return one sample an index, so that samples cannot be told apart.
    """

    _dataset: Any

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "_dataset", dataset)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if not indices:
            return []
        samples = self._dataset.__getitems__(indices)
        if not isinstance(samples, (list, tuple)) or len(samples) != len(indices):
            raise TypeError(
                f"Expected a list with one sample an index from {type(self._dataset).__name__}.__getitems__, got "
                f"{type(samples).__name__} for {len(indices)} indices. A private batch is cut into microbatches before "
                "it is collated: return a list of samples and build the batch in `collate_fn`."
            )
        return list(samples)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # a copy being built has no state yet
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __reduce__(self) -> tuple[type[NonEmptyGetitems], tuple[Any]]:
        return (NonEmptyGetitems, (self._dataset,))
