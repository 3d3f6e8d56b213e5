"""Functions that note the owners of the tensors in a list of records, and in a packed sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_dp.per_sample.owners.batch_reading import shown_by, walk
from lightning_dp.per_sample.owners.owned import Mixed, Rows

if TYPE_CHECKING:
    from lightning_dp.per_sample.owners.following import Follower


def note_records(records: Any, follower: Follower) -> list[Tensor]:
    """Note the tensors of a list of records; one that two different records hold is mixed.

    Returns:
        Tensors that show the arrays of the records: what the step makes of an array in its memory is found by them.
    """
    holders: dict[int, frozenset[int]] = {}
    shown: dict[int, Tensor | None] = {}
    for sample, record in enumerate(records):
        mine: dict[int, Any] = {id(part): part for _, part, _ in walk(record) if isinstance(part, (Tensor, np.ndarray))}
        whole = frozenset(mine)
        for key, part in mine.items():
            if not isinstance(part, Tensor) and key not in shown:
                shown[key] = shown_by(part)
            if (tensor := shown.get(key, part)) is None:
                continue
            if holders.setdefault(key, whole) == whole:
                follower.note(tensor, Rows(None, follower.identity(tensor.device)[sample : sample + 1]))
            else:
                holders[key] = frozenset()
                follower.note(tensor, Mixed("a tensor that two records share"))
    return [tensor for tensor in shown.values() if tensor is not None]


def note_packed(packed: PackedSequence, follower: Follower) -> None:
    """Note the tensors of a packed sequence."""
    follower.note(packed.data, Rows(0, _packed(packed)))
    if packed.sorted_indices is not None and packed.unsorted_indices is not None:
        follower.note(packed.sorted_indices, Rows(0, packed.sorted_indices.clone()))
        follower.note(packed.unsorted_indices, follower.samples(packed.unsorted_indices.device))


def _packed(packed: PackedSequence) -> Tensor:
    """Return the sample index of every row of a packed sequence."""
    order = packed.sorted_indices
    if order is None:
        order = torch.arange(int(packed.batch_sizes[0]), device=packed.data.device)
    return torch.cat([order[: int(num)] for num in packed.batch_sizes])
