"""A fast read of batches whose samples are rows of whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate


class Gather:
    """A wrapper of a ``TensorDataset``, or a ``Subset`` of one, that reads a batch of rows in one operation.

    To read 256 samples one by one and to stack them takes about a millisecond, to gather them a tenth of that. Its
    samples are the indices themselves; :meth:`collate` makes of them, bit for bit, the batch that the two would have
    made.

    Args:
        dataset: its tensors' rows are samples.
        indices: row of each sample, or None where they are the same.
    """

    def __init__(self, dataset: TensorDataset, indices: Tensor | None) -> None:
        self.dataset = dataset
        self.indices = indices

    @classmethod
    def of(cls, dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> Gather | None:
        """Return a wrapper for a dataset and the user's collate function, or None if either is customised."""
        indices: Tensor | None = None
        while type(dataset) is Subset:
            mine = _integers(dataset.indices)
            if mine is None:
                return None
            indices = mine if indices is None else mine[indices]
            dataset = dataset.dataset
        if type(dataset) is not TensorDataset or collate_fn is not default_collate:
            return None
        if not all(type(tensor) is Tensor and tensor.layout == torch.strided for tensor in dataset.tensors):
            return None
        return cls(dataset, indices)

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices

    def collate(self, samples: list[int]) -> list[Tensor]:
        """Return the batch of these samples: a list with one tensor of shape (B, ...) per tensor of the dataset."""
        rows = torch.from_numpy(np.array(samples, dtype=np.int64))  # a quarter of the time of torch.tensor
        if self.indices is not None:
            rows = self.indices[rows]
        return [tensor[rows.to(tensor.device)].contiguous() for tensor in self.dataset.tensors]


def is_plain(dataset: Any) -> bool:
    """Tell whether items are rows of tensors, read by torch's own code."""
    while type(dataset) in (Subset, ConcatDataset):
        if type(dataset) is ConcatDataset:
            return all(map(is_plain, dataset.datasets))
        dataset = dataset.dataset
    return type(dataset) is TensorDataset


def _integers(indices: Any) -> Tensor | None:
    try:
        found = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if found.dtype == torch.int64 and found.dim() == 1 else None
