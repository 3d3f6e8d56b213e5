"""Owners of rows that are put, or added, where an index or a mask says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dp.per_sample.owners.memo import Memo
from lightning_dp.per_sample.owners.owned import MIXED, NOBODY, Owners, Rows, compressed
from lightning_dp.per_sample.owners.reductions import Found, Step, entry_by_entry


def added(step: Step) -> Found:
    """Return the owners after rows are added up by an index."""
    by_id = {id(tensor): rows for tensor, rows in step.owned}
    target, dim, index, source = step.args[:4]
    if step.func.__name__.startswith("scatter") and all(
        rows.axis not in (None, dim % target.dim()) and one.shape[rows.axis] == target.shape[rows.axis]
        for one, rows in step.owned
    ):
        return entry_by_entry(step)  # within rows
    # counted constants belong to the owner of the index
    rows = by_id.get(id(source), by_id.get(id(index)))
    return after_adding(target, dim, index, by_id.get(id(target)), rows, step.memo)


def filled(step: Step) -> Found:
    """Return the owners after entries are put, one after the other, where a mask of their owner says."""
    target, mask, source = step.args
    by_id = {id(tensor): rows for tensor, rows in step.owned}
    nobody = step.identity.new_full((1,), NOBODY)
    labels, chosen, put = (
        nobody.expand(one.shape) if (rows := by_id.get(id(one))) is None else rows.labels(one.shape)
        for one in (target, mask, source)
    )
    made = labels.expand(step.out.shape).contiguous().masked_scatter_(mask, put.contiguous())
    chosen = chosen.expand(step.out.shape)
    if not bool(((chosen == made) | (chosen == NOBODY) | (made == NOBODY)).all()):
        return MIXED
    return compressed(torch.maximum(made, chosen), step.memo.shared)


def counted(step: Step) -> Found:
    """Return the owners of the numbers of times that an index names each position."""
    rows = next(rows for _, rows in step.owned)
    if any(other.index is not rows.index for _, other in step.owned):  # weights
        return MIXED
    return after_adding(step.out, 0, step.args[0], None, rows, step.memo)


def segmented(step: Step) -> Found:
    """Return the owners of reduced segments of rows, given by their lengths or by where they begin and end."""
    data, options = step.args[0], step.kwargs
    rows = next((rows for tensor, rows in step.owned if tensor is data), None)
    lengths, offsets = options.get("lengths"), options.get("offsets")
    if lengths is None and offsets is not None:
        lengths = offsets.diff()
    if lengths is None or lengths.dim() != 1 or options.get("axis", 0) or int(lengths.sum()) != len(data):
        return MIXED
    index = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return after_adding(step.out, 0, index, None, rows, step.memo)


def after_adding(target: Tensor, dim: int, index: Tensor, before: Rows | None, rows: Rows | None, memo: Memo) -> Owners:
    """Return the owners after rows are added to a target by an index; mixed if one sum holds rows of several samples.

    Args:
        target: that rows are added to.
        dim: axis of the index.
        index: position in the target of every row, or of every entry.
        before: owners of the target.
        rows: owners of the rows.
        memo: of the microbatch.
    """
    axis = dim % target.dim()
    if rows is None and before is None:
        return None
    if rows is None or (rows.axis is not None and rows.axis != axis):
        return MIXED
    if before is not None and (before.axis is None or before.axis != axis):
        return MIXED
    if index.dim() > 1:  # the same index for all entries of a row, as message passing has it
        whole, sizes, strides, repeats = index, index.shape, index.stride(), True
        for other in range(len(sizes) - 1, -1, -1):
            if other != axis:
                repeats &= strides[other] == 0 or sizes[other] == 1
                index = index.select(other, 0)
        if not repeats and not torch.equal(index.view(-1, *[1] * (whole.dim() - axis - 1)).expand_as(whole), whole):
            return MIXED
    size, device = target.shape[axis], index.device
    alike = [known for known in memo.known if known.num == size and known.index.device == device]
    fits = len(alike) == 1 and (before is None or before.index is alike[0].index)
    said = memo.at(alike[0], index) if fits else None  # the owners of the rows that are added to
    if said is not None and said.index is rows.index and rows.axis is not None:
        return alike[0].moved(axis)
    found = memo.get(
        ("added", size, rows.axis is None),
        (rows, before),
        index,
        lambda: _sums(rows, before, index, size, alike, said, memo),
    )
    return found.moved(axis) if isinstance(found, Rows) else found


def _sums(
    rows: Rows, before: Rows | None, index: Tensor, size: int, alike: list[Rows], said: Rows | None, memo: Memo
) -> Owners:
    """Return the owners of sums of rows along the first axis.

    Args:
        rows: owners of the rows.
        before: owners of the target.
        index: position in the target of every row.
        size: length of the target.
        alike: owners that the batch holds for as many rows.
        said: of these, those at the index; None if there are several, or none, or the target has other owners.
        memo: of the microbatch.
    """
    owners = rows.labels(index.shape) if rows.axis is None else rows.index[: index.shape[0]]
    if said is not None and torch.equal(torch.where(owners == NOBODY, said.index, owners), said.index):
        return alike[0]
    made = owners.new_full((size,), NOBODY).scatter_reduce_(0, index, owners, "amax")
    if not bool(((made[index] == owners) | (owners == NOBODY)).all()):
        return MIXED
    if before is not None:
        both = torch.maximum(made, before.index)
        if not all(bool(((one == both) | (one == NOBODY)).all()) for one in (made, before.index)):
            return MIXED
        made = both
    # messages that were selected from rows often return to these rows
    senders = [one for one in memo.origins_of(rows) if one.num == size and not one.has_nobody]
    fitting = [one for one in (*alike, *senders) if bool(((made == one.index) | (made == NOBODY)).all())]
    if fitting and all(torch.equal(fitting[0].index, other.index) for other in fitting[1:]):
        return fitting[0]  # also the rows that nothing was added to
    return Rows(0, made)


HANDLERS: dict[str, Callable[[Step], Found]] = {
    "bincount": counted,
    "segment_reduce": segmented,
    "masked_scatter": filled,
}
