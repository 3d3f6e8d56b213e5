"""Owners of rows: the sample of each row of a tensor, and the layout of unequal numbers of rows for a rule.

Legend: ``B`` samples, ``R`` rows, ``K`` most rows of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

NOBODY = -1
"""Owner of a row that holds no sample's data: padding, a constant."""


class Rows:
    """The owners of a tensor's entries: one per position along an axis, or one sample for the whole tensor.

    Args:
        axis: axis along which the owners vary; None if the whole tensor belongs to one sample.
        index: int64, shape ``(R,)`` with the owner of each entry of the axis, or ``NOBODY``; ``(1,)`` for one sample.
            Nothing may write to it.
        is_identity: whether row b belongs to sample b in every batch, because of the way it was computed.
        layout: results of :func:`arrangement` for this index.
    """

    __slots__ = ("axis", "index", "is_identity", "layout", "num", "only")

    def __init__(
        self, axis: int | None, index: Tensor, *, is_identity: bool = False, layout: dict[Any, Any] | None = None
    ) -> None:
        self.axis, self.index, self.is_identity = axis, index, is_identity
        self.layout: dict[Any, Any] = {} if layout is None else layout
        self.num = index.numel()
        self.only = int(index[0]) if axis is None and int(index[0]) != NOBODY else None
        """The one sample that owns the whole tensor, if this needs no axis."""

    def moved(self, axis: int | None) -> Rows:
        """Return the same owners along another axis."""
        if axis == self.axis:
            return self
        return Rows(axis, self.index, is_identity=self.is_identity, layout=self.layout)

    @property
    def _bounds(self) -> tuple[int, int]:
        """The lowest and the highest owner."""
        if "bounds" not in self.layout:
            low, high = self.index.aminmax() if self.index.numel() else (0, NOBODY)
            self.layout["bounds"] = int(low), int(high)
        found: tuple[int, int] = self.layout["bounds"]
        return found

    def has(self, owner: int) -> bool:
        """Tell whether some entries belong to the last of all owners."""
        return self._bounds[1] == owner

    @property
    def has_nobody(self) -> bool:
        """True if some entries belong to nobody."""
        if "has_nobody" not in self.layout:
            self.layout["has_nobody"] = self._bounds[0] == NOBODY
        return bool(self.layout["has_nobody"])

    @property
    def sole(self) -> int | None:
        """The one sample that owns all entries which somebody owns; None if there are several, or none."""
        low, high = self._bounds
        if high == NOBODY or low not in (high, NOBODY):
            return None
        return high if low == high or bool(((self.index == high) | (self.index == NOBODY)).all()) else None

    def labels(self, shape: torch.Size) -> Tensor:
        """Return the owner of every entry of a tensor of a given shape, as an expanded view."""
        if self.axis is None:
            return self.index.expand(shape) if len(shape) else self.index[0]
        wide = [1] * len(shape)
        wide[self.axis] = self.index.shape[0]
        return self.index.view(wide).expand(shape)


class Mixed(NamedTuple):
    """The owners of a tensor whose entries have unknown owners or mix several samples.

    Args:
        by: the operation that mixed them, for messages.
        is_running: whether they were computed from running sums of numbers of rows, such as the positions at which
            samples begin.
    """

    by: str = "what no operation on the batch made"
    is_running: bool = False

    @property
    def spread(self) -> Mixed:
        """The owners of what is computed from such a tensor."""
        return self


class Entries(Mixed):
    """The owners of a tensor whose entries have one known owner each, which no axis tells.

    Attributes:
        labels: owner of every entry, or ``NOBODY``, of the tensor's shape.
    """

    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor, by: str) -> Entries:
        """Return the owners that labels give to the entries of an operation's result."""
        made = cls(by)
        made.labels = labels
        return made

    @property
    @override
    def spread(self) -> Mixed:
        return Mixed(self.by)


MIXED = Mixed()

Owners = Rows | Mixed | None
"""``None``: the tensor holds no sample's data."""


def fits(tensor: Tensor, owners: Owners) -> bool:
    """Tell whether owners have one entry for each row of a tensor."""
    if not isinstance(owners, Rows) or owners.axis is None:
        return True
    return 0 <= owners.axis < tensor.dim() and tensor.size(owners.axis) == owners.num


def compressed(labels: Tensor, shared: Callable[[Tensor], Rows]) -> Owners:
    """Return the owners given by labels of entries; mixed if they vary along more than one axis.

    Args:
        labels: owner of every entry.
        shared: returns rows with these owners along the first axis.
    """
    for axis, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    if labels.numel() == 0:
        return Rows(labels.shape.index(0), labels.flatten())
    top = int(labels.max())
    if top == NOBODY:
        return None
    axes = [axis for axis in range(labels.dim()) if labels.shape[axis] > 1]
    if axes and axes[0] > 0 and bool((labels == top).all()):  # one row
        return Rows(None, labels.new_tensor([top]))
    if len(axes) == 1:
        return shared(labels.reshape(-1)).moved(axes[0])
    for axis in axes:
        flat = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
        index = flat.amax(1)
        if bool(((flat == index[:, None]) | (flat == NOBODY)).all()):
            return shared(index).moved(axis)
    if bool(((labels == top) | (labels == NOBODY)).all()):
        return Rows(None, labels.new_tensor([top]))
    return MIXED


@dataclass(frozen=True)
class OwnedAxis:
    """An axis whose entries belong to samples by an index; samples may own different numbers of entries.

    Args:
        axis: position of the axis; None for a tensor of one sample, which gets an axis of length 1.
        index: owner of every entry, shape ``(R,)``.
        layout: results of :func:`arrangement` for this index.
    """

    axis: int | None
    index: Tensor
    layout: dict[Any, Any] = field(default_factory=dict, compare=False)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the tensor with the axis of its rows first; the order of rows stays."""
        return tensor if self.axis == 0 else tensor.unsqueeze(0) if self.axis is None else tensor.movedim(self.axis, 0)

    def to_front(self, tensor: Tensor, batch_size: int, where: object) -> tuple[Tensor, int]:
        """Return a tensor's rows grouped by sample, zero-padded to ``K`` rows per sample, and ``K``."""
        return laid_out([self.rows(tensor)], arrangement([self], batch_size))


Arrangement = tuple[Tensor | None, int, int]
"""Row of every entry in a tensor of ``B * K`` rows (None if every entry is in its row); ``B * K``; ``K``."""


def arrangement(axes: list[OwnedAxis], batch_size: int) -> Arrangement:
    """Return the rows that the entries of several axes get, grouped by sample; computed once for each index."""
    layout = axes[0].layout
    # other layouts are part of the key and so stay alive
    key = batch_size if len(axes) == 1 else (batch_size, *(_ById(axis.index) for axis in axes))
    if key not in layout:
        layout[key] = _arranged(axes[0].index if len(axes) == 1 else torch.cat([a.index for a in axes]), batch_size)
    found: Arrangement = layout[key]
    return found


class _ById:
    """A tensor as a key, compared by identity."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


def _arranged(index: Tensor, batch_size: int) -> Arrangement:
    num_entries = index.shape[0]
    if num_entries == 0:
        return index if batch_size else None, batch_size, 1
    ordered, order = index.sort(stable=True)
    within = torch.arange(num_entries, device=index.device).sub_(torch.searchsorted(ordered, ordered))
    most = int(within.max()) + 1
    num, is_sorted = batch_size * most, torch.equal(ordered, index)
    if is_sorted and num == num_entries and (int(ordered[0]), int(ordered[-1])) == (0, batch_size - 1):
        return None, num, most
    rows = within.add_(ordered, alpha=most)
    return rows if is_sorted else torch.empty_like(index).scatter_(0, order, rows), num, most


def laid_out(parts: list[Tensor], arranged: Arrangement) -> tuple[Tensor, int]:
    """Return the rows of several tensors as ``(B * K, ...)``; samples with fewer rows are padded with zeros, which add
    nothing to any gradient.

    Args:
        parts: rows first.
        arranged: of the owners of all parts.
    """
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    places, num, most = arranged
    if places is None:
        return rows, most
    return rows.new_zeros(num, *rows.shape[1:]).index_copy_(0, places.to(rows.device), rows), most


def may_change(tensor: Tensor, before: Owners, after: Owners) -> bool:
    """Tell whether an in-place write may change the owners of other views of the same memory."""
    if before is after or not tensor.numel():
        return False
    if isinstance(before, Rows) and isinstance(after, Rows):
        return before.axis != after.axis or not torch.equal(before.index, after.index)
    return True
