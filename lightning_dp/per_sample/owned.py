"""Owners of rows: the sample of each row of a tensor, and the layout of unequal numbers of rows for a rule.

Legend: ``B`` samples, ``R`` rows, ``K`` most rows of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NOBODY = -1
"""Owner of a row that holds no sample's data: padding, a constant."""


class Rows:
    """The owners of a tensor's entries: one per position along an axis, or one sample for the whole tensor.

    Args:
        axis: axis along which the owners vary; None if the whole tensor belongs to one sample.
        index: int64, shape ``(R,)`` with the owner of each entry of the axis, or ``NOBODY``; ``(1,)`` for one sample.
        is_identity: whether row b belongs to sample b in every batch, because of the way it was computed.
    """

    __slots__ = ("axis", "index", "is_identity", "only")

    def __init__(self, axis: int | None, index: Tensor, *, is_identity: bool = False) -> None:
        self.axis, self.index, self.is_identity = axis, index, is_identity
        self.only = int(index[0]) if index.numel() == 1 and int(index[0]) != NOBODY else None
        """The one sample that owns everything, where it is seen at once."""

    def moved(self, axis: int | None) -> Rows:
        """Return the same owners along another axis."""
        return self if axis == self.axis else Rows(axis, self.index, is_identity=self.is_identity)

    def labels(self, shape: torch.Size) -> Tensor:
        """Return the owner of every entry of a tensor of a given shape, as an expanded view."""
        if self.axis is None:
            return self.index.expand(shape) if len(shape) else self.index[0]
        wide = [1] * len(shape)
        wide[self.axis] = len(self.index)
        return self.index.view(wide).expand(shape)


class Mixed(NamedTuple):
    """The owners of a tensor whose entries have unknown owners or mix several samples.

    Args:
        by: the operation that mixed them, for messages.
    """

    by: str = "what no operation on the batch made"


MIXED = Mixed()

Owners = Rows | Mixed | None
"""``None``: the tensor holds no sample's data."""


def compressed(labels: Tensor, identity: Tensor) -> Owners:
    """Return the owners given by labels of entries; mixed if they vary along more than one axis.

    Args:
        labels: owner of every entry.
        identity: ``0 ... B - 1``.
    """
    for axis, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    if labels.numel() == 0:
        return Rows(0, identity[:0]) if labels.dim() else None
    top = int(labels.max())
    if top == NOBODY:
        return None
    axes = [axis for axis in range(labels.dim()) if labels.shape[axis] > 1]
    if len(axes) == 1:
        index = labels.reshape(-1)
        is_identity = _fills_identity(index, identity)
        return Rows(axes[0], identity if is_identity else index, is_identity=is_identity)
    for axis in axes:
        flat = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
        index = flat.amax(1)
        if bool(((flat == index[:, None]) | (flat == NOBODY)).all()):
            return Rows(axis, index, is_identity=_fills_identity(index, identity))
    if bool(((labels == top) | (labels == NOBODY)).all()):
        return Rows(None, labels.new_tensor([top]))
    return MIXED


def _fills_identity(index: Tensor, identity: Tensor) -> bool:
    return len(index) == len(identity) and torch.equal(index, identity)


def merged(owners: list[tuple[int, Rows]], num_axes: int) -> Owners:
    """Return the owners of a result computed entry by entry from broadcast tensors.

    Args:
        owners: number of axes and owners of each tensor that holds data.
        num_axes: number of axes of the result.
    """
    found: Rows | None = None
    whole: int | None = None
    for axes, rows in owners:
        if rows.only is not None:
            if whole not in (None, rows.only):
                return MIXED
            whole = rows.only
            continue
        assert rows.axis is not None
        here = rows.moved(rows.axis + num_axes - axes)
        if found is None:
            found = here
        elif found.axis != here.axis:
            return MIXED
        elif found.index is not here.index:
            if found.index.shape != here.index.shape:
                return MIXED
            if torch.equal(found.index, here.index):
                found = here if here.is_identity else found
                continue
            both = torch.maximum(found.index, here.index)
            if not all(bool(((one == both) | (one == NOBODY)).all()) for one in (found.index, here.index)):
                return MIXED
            found = Rows(here.axis, both, is_identity=found.is_identity or here.is_identity)
    if whole is None:
        return found
    if found is None or bool(((found.index == whole) | (found.index == NOBODY)).all()):
        like = owners[0][1].index
        return Rows(None, like.new_tensor([whole])) if found is None else found
    return MIXED


@dataclass(frozen=True)
class OwnedAxis:
    """An axis whose entries belong to samples by an index; samples may own different numbers of entries.

    Args:
        axis: position of the axis; None for a tensor of one sample, which gets an axis of length 1.
        index: owner of every entry, shape ``(R,)``.
    """

    axis: int | None
    index: Tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the tensor with the axis of its rows first; the order of rows stays."""
        return tensor.unsqueeze(0) if self.axis is None else tensor.movedim(self.axis, 0)

    def to_front(self, tensor: Tensor, batch_size: int, where: str) -> tuple[Tensor, int]:
        """Return a tensor's rows grouped by sample, zero-padded to ``K`` rows per sample, and ``K``."""
        return laid_out([self.rows(tensor)], self.index, batch_size)


def laid_out(parts: list[Tensor], index: Tensor, batch_size: int) -> tuple[Tensor, int]:
    """Return the rows of several tensors as ``(B * K, ...)``; samples with fewer rows are padded with zeros.

    A row of zeros with a backprop of zeros adds nothing to any gradient.

    Args:
        parts: rows first.
        index: owner of each row of all parts, shape ``(R,)``.
        batch_size: ``B``.
    """
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    if len(index) == batch_size and torch.equal(index, torch.arange(batch_size, device=index.device)):
        return rows, 1
    counts = torch.bincount(index, minlength=batch_size)
    most = max(1, int(counts.max())) if batch_size else 1
    order = index.argsort(stable=True)
    ordered = index[order]
    place = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[ordered]
    out = rows.new_zeros(batch_size * most, *rows.shape[1:])
    out[(ordered * most + place).to(rows.device)] = rows[order.to(rows.device)]
    return out, most
