"""Conversion of training data to one ``DataLoader`` over records: bulk loading, collections, iterables of batches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset

from lightning_dp import _messages
from lightning_dp.sampling.checks import check_loader, dataset_length, unwrap_sampler
from lightning_dp.sampling.fetch import read
from lightning_dp.sampling.loader import kept_options


def one_loader(given: Any, *, sampling: str, mode: str = "max_size_cycle") -> Any:
    """Convert training data to one loader over records; return such a loader unchanged.

    A list or dictionary of loaders becomes one loader whose batches have that structure. Record i then consists of item
    i of each dataset: **the guarantee protects whoever contributes item i to all of them**.

    An iterable of collated batches becomes a stream of their rows, in the same batches.

    Args:
        given: a loader, an iterable of batches, or a list or dictionary of loaders.
        sampling: "poisson", "shuffle" or "cyclic"; batches of an iterable need "shuffle".
        mode: how Lightning's ``CombinedLoader`` reads several loaders. "min_size" leaves out what a loader has beyond
            the shortest one; under the others, loaders of unequal length are refused, and under "sequential" all.

    Returns:
        A ``DataLoader``; or ``given`` itself, if ``check_loader`` is to refuse it.

    Raises:
        TypeError: a collection that holds other objects than loaders.
        ValueError: loaders that cannot be parts of one record.

    Example:
        >>> joined = one_loader({"a": DataLoader(range(4), 2), "b": DataLoader(range(10, 14), 2)}, sampling="poisson")
        >>> next(iter(joined))
        {'a': tensor([0, 1]), 'b': tensor([10, 11])}
    """
    if not isinstance(given, (list, tuple, dict)):
        return _recorded(given, sampling)
    loaders, structure = tree_flatten(given, is_leaf=lambda node: not isinstance(node, (list, tuple, dict)))
    if not loaders or not all(isinstance(loader, DataLoader) for loader in loaders):
        kinds = sorted({type(loader).__name__ for loader in loaders})
        raise TypeError(
            f"Expected DataLoaders in the {type(given).__name__} of training data, got {', '.join(kinds) or 'none'}. "
            "Private sampling needs the records behind each: return one DataLoader, or a collection of them."
        )
    return _joined([_recorded(loader, sampling) for loader in loaders], structure, sampling, mode)


def _recorded(loader: Any, sampling: str) -> Any:
    """Return a loader over single records for a loader in bulk or an iterable of batches; else the same loader."""
    if isinstance(loader, DataLoader):
        in_bulk = isinstance(unwrap_sampler(loader.sampler), BatchSampler)
        return _single_reads(loader) if in_bulk and type(loader).__iter__ is DataLoader.__iter__ else loader
    if sampling == "shuffle" and isinstance(loader, Iterable):
        return _rows_of(loader)
    return loader


# ---------------------------------------------------------------- bulk loading


class _Positions(Dataset[Any]):
    """A dataset of positions; records are read in bulk when they are collated. Attributes are the wrapped dataset's."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return dataset_length(self.dataset)

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        return list(indices)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # a copy being built has no state yet
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _ReadInBulk:
    """A collate function that reads the records at the given positions in bulk."""

    def __init__(self, dataset: Any, collate_fn: Any) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn

    def __call__(self, positions: list[int]) -> Any:
        return self.collate_fn(self.dataset[positions])


def _single_reads(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader over single positions for ``DataLoader(dataset, sampler=BatchSampler(...), batch_size=None)``."""
    return DataLoader(
        _Positions(loader.dataset),
        batch_sampler=unwrap_sampler(loader.sampler),
        collate_fn=_ReadInBulk(loader.dataset, loader.collate_fn),
        **kept_options(loader),
    )


# ---------------------------------------------------------------- collections of loaders


class _Parts(Dataset[Any]):
    """A dataset whose record i combines item i of every dataset."""

    def __init__(self, datasets: list[Any]) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return dataset_length(self.datasets[0])

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return tuple(dataset[index] for dataset in self.datasets)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, ...]]:
        return list(zip(*(read(dataset, indices) for dataset in self.datasets), strict=True))


class _CollateParts:
    """A collate function that applies each loader's own function to its part, in the structure of the loaders."""

    def __init__(self, collates: list[Any], structure: TreeSpec) -> None:
        self.collates, self.structure = collates, structure

    def __call__(self, records: list[Any]) -> Any:
        parts = zip(*records, strict=True) if len(self.collates) > 1 else [records]
        batches = [collate(list(part)) for collate, part in zip(self.collates, parts, strict=True)]
        return tree_unflatten(batches, self.structure)


def _joined(loaders: list[DataLoader[Any]], structure: TreeSpec, sampling: str, mode: str) -> DataLoader[Any]:
    for loader in loaders:
        check_loader(loader, sampling)
    first, collate = loaders[0], _CollateParts([loader.collate_fn for loader in loaders], structure)
    if len(loaders) == 1:
        return _loader_like(first, first.dataset, collate)
    if mode == "sequential":
        raise ValueError(
            f"Expected training loaders that are read together, got {len(loaders)} in mode='sequential'. A logical "
            "batch is drawn from all records: join the datasets by torch.utils.data.ConcatDataset and return one "
            "loader."
        )
    if any(isinstance(loader.dataset, IterableDataset) for loader in loaders):
        raise ValueError(
            f"Expected datasets with random access in {len(loaders)} training loaders, got a stream. Item i of each is "
            "one record, and the streams may not have the same order: join them in one IterableDataset."
        )
    lengths = [dataset_length(loader.dataset) for loader in loaders]
    sizes = [getattr(loader.batch_sampler, "batch_size", None) for loader in loaders]
    if len(set(sizes)) > 1 or (len(set(lengths)) > 1 and mode != "min_size"):
        pairs = zip(lengths, sizes, strict=True)
        listed = ", ".join(f"{length} records in batches of {batch_size}" for length, batch_size in pairs)
        raise ValueError(
            f"Expected {len(loaders)} training loaders of equal length and batch size, each a part of one record, got "
            f"{listed}. Join datasets of other records by torch.utils.data.ConcatDataset, or give both one length. "
            'CombinedLoader(loaders, "min_size") leaves out what is beyond the shortest.'
        )
    shortest, datasets = min(lengths), [loader.dataset for loader in loaders]
    if shortest < max(lengths):
        datasets = [Subset(dataset, range(shortest)) for dataset in datasets]
        _messages.info(
            f'Under mode="min_size" the first {shortest} records of each training loader form records together; those '
            "beyond are left out in all epochs, where a plain Trainer draws others in each epoch if it shuffles."
        )
    return _loader_like(loaders[lengths.index(shortest)], _Parts(datasets), collate)


def _loader_like(loader: DataLoader[Any], dataset: Any, collate_fn: Any) -> DataLoader[Any]:
    """Return a plain loader over ``dataset`` with the batch settings and workers of another loader."""
    options = kept_options(loader)
    if loader.batch_sampler is None or isinstance(dataset, IterableDataset):
        options |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    else:
        options["batch_sampler"] = loader.batch_sampler
    return DataLoader(dataset, collate_fn=collate_fn, **options)


# ---------------------------------------------------------------- iterables of batches


class RowsOfBatches(IterableDataset[Any]):
    """A stream of the single rows of an iterable's batches.

    Args:
        batches: iterable of batches of ``batch_size`` rows; the last batch of a pass may be smaller.
        batch_size: number of rows in a batch.
    """

    def __init__(self, batches: Iterable[Any], batch_size: int) -> None:
        self.batches, self.batch_size = batches, batch_size

    def __iter__(self) -> Iterator[Any]:
        short = 0
        for batch in _begun(self.batches):
            rows = _rows(batch)
            if short or len(rows) > self.batch_size:
                raise ValueError(
                    f"Expected batches of {self.batch_size} rows, as the first one has, but for the last, got "
                    f"{short or len(rows)}. The batch size is public: let the iterable yield batches of equal size."
                )
            short = len(rows) if len(rows) < self.batch_size else 0
            yield from rows


class _SizedRowsOfBatches(RowsOfBatches):
    """A stream of the rows of an iterable with a length; for its length, a shorter last batch counts as a full one."""

    def __len__(self) -> int:
        return len(self.batches) * self.batch_size  # type: ignore[arg-type]


def _rows_of(batches: Any) -> DataLoader[Any]:
    """Return a loader over the rows of an iterable of batches, with the same batch boundaries."""
    first = next(_begun(batches), None)
    if first is None:
        raise ValueError(f"Expected batches to train on, got none from {type(batches).__name__}. Check the data.")
    if iter(batches) is batches and len(batches) != (found := sum(1 for _ in _begun(batches))):
        raise _read_once(batches, f"whose second pass has {found} batches instead of {len(batches)}")
    kind = _SizedRowsOfBatches if hasattr(batches, "__len__") else RowsOfBatches
    size = len(_rows(first))
    return DataLoader(kind(batches, size), batch_size=size, collate_fn=_stacked)


def _begun(batches: Any) -> Iterator[Any]:
    """Return an iterator that begins again; of an object that is its own iterator, that of a copy, so that passes do
    not disturb each other.
    """
    iterator: Iterator[Any] = iter(batches)
    if iterator is not batches:
        return iterator
    if not hasattr(batches, "__len__"):
        raise _read_once(batches, "which has no length")
    try:
        return iter(copy.copy(batches))
    except TypeError as error:
        raise _read_once(batches, "which cannot be copied") from error


def _read_once(batches: Any, cause: str) -> ValueError:
    return ValueError(
        f"Expected training data that can be read more than once, got a {type(batches).__name__}, {cause}. Records are "
        "read before the first step, too: return an object whose __iter__ begins again."
    )


def _is_column(node: Any) -> bool:
    """Tell whether a part of a batch is a column of entries: a tensor, an array, or a list of words or numbers."""
    if isinstance(node, (list, tuple)):
        return bool(node) and all(isinstance(entry, (str, bytes, bool, int, float)) for entry in node)
    return isinstance(node, (Tensor, np.ndarray)) and node.ndim > 0


def _rows(batch: Any) -> list[Any]:
    """Return the records of a collated batch.

    Raises:
        TypeError: some part of the batch does not have one entry per record.
    """
    columns, structure = tree_flatten(batch, is_leaf=_is_column)
    wrong = [column for column in columns if not _is_column(column)]
    lengths = {len(column) for column in columns if _is_column(column)}
    if wrong or len(lengths) != 1:
        found = type(wrong[0]).__name__ if wrong else f"lengths {sorted(lengths)}"
        raise TypeError(
            f"Expected every part of a batch to have one row per record, got {found}. Records could not be "
            "distinguished: yield tensors of equal first length, or return a DataLoader."
        )
    return [tree_unflatten([column[row] for column in columns], structure) for row in range(lengths.pop())]


def _stacked(rows: list[Any]) -> Any:
    """Collate rows to a batch; tensors and arrays are stacked, other entries stay in lists."""
    flattened = [tree_flatten(row) for row in rows]
    columns = zip(*(leaves for leaves, _ in flattened), strict=True)
    return tree_unflatten([_column(list(entries)) for entries in columns], flattened[0][1])


def _column(entries: list[Any]) -> Any:
    if isinstance(entries[0], Tensor):
        return torch.stack(entries)
    if isinstance(entries[0], (np.ndarray, np.generic)):
        return np.stack(entries)
    return entries
