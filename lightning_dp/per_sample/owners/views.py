"""Owners after operations that move whole rows: views, read from strides; rows selected by an index; joined tensors.

No labels of single entries are needed for these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import is_mapped
from lightning_dp.per_sample.owners.axes import AXES, RESHAPES
from lightning_dp.per_sample.owners.entries import by_entry
from lightning_dp.per_sample.owners.memo import Memo, merged
from lightning_dp.per_sample.owners.owned import MIXED, NOBODY, Mixed, Owners, Rows, compressed
from lightning_dp.per_sample.owners.reductions import Found, Step, alone
from lightning_dp.per_sample.tracking.arguments import tensors_in

_OF_INDICES = frozenset((torch.int64, torch.int32, torch.bool))
_CUTS = frozenset(("split", "split_with_sizes", "unsafe_split", "chunk", "unsafe_chunk"))


def owners_of_view(tensor: Tensor, rows: Rows, out: Tensor, memo: Memo) -> Rows | None:
    """Return the owners of a view of a tensor; None where this cannot be seen from strides.

    The entry at memory offset ``o`` of a tensor has position ``(o mod P) // s`` on the axis of the owners: ``s`` is the
    axis' stride, the other axes move by less than ``s`` together or by multiples of ``P``. An axis of the view that
    moves by ``s`` follows the owners, one that moves by less or by multiples of ``P`` stays with one.

    Args:
        tensor: the tensor.
        rows: its owners.
        out: result of an operation on the tensor that shows entries of it.
        memo: of the microbatch.
    """
    axis = rows.axis
    strided = tensor.layout == out.layout == torch.strided and out.dtype == tensor.dtype and not is_mapped(tensor)
    if (
        axis is None
        or out is tensor
        or not strided
        or out.dtype != tensor.dtype
        or not (tensor.numel() and out.numel())
    ):
        return None
    sizes, strides = tensor.shape, tensor.stride()
    size, stride = sizes[axis], strides[axis]
    others = [(n, t) for at, (n, t) in enumerate(zip(sizes, strides, strict=True)) if at != axis and n > 1]
    inner = sum(t * (n - 1) for n, t in others if t < stride)
    outer = [(n, t) for n, t in others if t >= stride]
    period = min((t for _, t in outer), default=0)
    if size < 2 or inner >= stride or (outer and (period < stride * size or any(t % period for _, t in outer))):
        return None
    reach = inner + stride * (size - 1) + sum(t * (n - 1) for n, t in outer)
    start, apart = divmod(out.data_ptr() - tensor.data_ptr(), tensor.element_size())
    if apart or not 0 <= start <= reach:  # memory of its own
        return None
    first, rest = divmod(start % period if outer else start, stride)  # then the part of a row that is reached
    found: tuple[int, int, int] | None = None
    for at, (n, t) in enumerate(zip(out.shape, out.stride(), strict=True)):
        if n == 1 or t == 0 or (outer and t % period == 0):
            continue
        if t < stride:
            rest += t * (n - 1)
        elif t % stride == 0 and found is None:
            found = at, n, t // stride
        else:
            return None
    if rest >= stride or first + (0 if found is None else (found[1] - 1) * found[2]) >= size:
        return None
    if found is None and int(rows.index[first]) == NOBODY:
        return None
    if found is None:
        only: Rows = memo.get(("one", first), (rows,), None, lambda: Rows(None, rows.index[first : first + 1]))
        return only
    at, n, step = found
    if (first, n, step) == (0, size, 1):
        return rows.moved(at)
    end = first + (n - 1) * step + 1
    part: Rows = memo.get(("part", first, end, step), (rows,), None, lambda: Rows(at, rows.index[first:end:step]))
    return part.moved(at)


def owners_behind(base: Tensor, before: Owners, view: Tensor, after: Owners, memo: Memo, size: int) -> Owners:
    """Return the owners of a tensor after a view of it was written to; mixed where this cannot be seen from strides.

    Args:
        base: the tensor.
        before: its owners before; constants that are written leave them as they are.
        view: the view.
        after: its owners now.
        memo: of the microbatch.
        size: number of samples.
    """
    if after is None or isinstance(before, Mixed) or isinstance(after, Mixed):
        return before if after is None else MIXED
    if size == 1:
        return before or (MIXED if after.sole is None else Rows(None, after.index.new_tensor([after.sole])))
    for axis in range(base.dim()) if before is None else [before.axis]:
        if axis is None:
            return before if before is not None and before.only == after.sole else MIXED
        places = Rows(axis, torch.arange(base.shape[axis], device=after.index.device))
        shown = owners_of_view(base, places, view, memo)
        if shown is not None and shown.axis == after.axis:
            made = after.index.new_full((base.shape[axis],), NOBODY) if before is None else before.index.clone()
            mine = made[shown.index]
            if bool(((mine != after.index) & (mine != NOBODY) & (after.index != NOBODY)).any()):
                return MIXED
            made[shown.index] = torch.maximum(mine, after.index)
            return memo.shared(made).moved(axis)
    return MIXED


def moved_rows(step: Step, name: str, tensor: Tensor, rows: Rows) -> Found:
    """Return the owners after an operation that moves whole rows of one tensor; None for other operations."""
    if rows.axis is None:
        return _reshaped(rows, tensor.shape, step.out.shape, step) if name in RESHAPES else None
    if name in _CUTS:
        return _cut(step, rows, tensor.dim())
    at = AXES[name](tensor, rows.axis, step.args, step.kwargs, step.out) if name in AXES else None
    if at is not None and step.out.shape[at] == rows.index.shape[0]:
        return rows.moved(at)
    if name in RESHAPES:
        before, after = tensor.shape, step.out.shape
        key = "reshape", rows.axis, before, after
        made: Found = step.memo.get(key, (rows,), None, lambda: _reshaped(rows, before, after, step))
        return made
    found = rows_at(step.memo, name, step.args, rows, tensor.dim())
    if found is not None:
        return found
    views = [owners_of_view(tensor, rows, out, step.memo) for out in tensors_in((step.out,), {})]
    if None in views:
        return None
    return views[0] if isinstance(step.out, Tensor) else views  # type: ignore[return-value]


def _cut(step: Step, rows: Rows, num_axes: int) -> list[Owners]:
    """Return the owners of consecutive pieces of a tensor."""
    over = (step.args[2] if len(step.args) > 2 else step.kwargs.get("dim", 0)) % num_axes
    if over != rows.axis:
        return [rows] * len(step.out)
    sizes = tuple(one.shape[over] for one in step.out)

    def made() -> list[Owners]:
        return [Rows(over, part) for part in torch.split(rows.index, [*sizes])]

    found: list[Owners] = step.memo.get(("cut", over, sizes), (rows,), None, made)
    return found


def rows_at(memo: Memo, name: str, args: Any, rows: Rows, num_axes: int) -> Rows | None:
    """Return the owners of whole rows that an index selects along the axis of the owners; None for other operations."""
    index: Any = None
    if name == "index_select" and len(args) == 3:
        index = args[2] if args[1] % num_axes == rows.axis else None
    elif name == "__getitem__":
        parts = args[1] if type(args[1]) is tuple else (args[1],)
        whole = len(parts) == 1 or all(isinstance(one, slice) and one == slice(None) for one in parts[:-1])
        index = parts[-1] if whole and len(parts) - 1 == rows.axis else None
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in _OF_INDICES:
        return None
    found = memo.at(rows, index)
    return None if found is None else found.moved(rows.axis)


def joined_rows(step: Step, data: list[Tensor], by_id: dict[int, Rows]) -> Found:
    """Return the owners of tensors that are put together, one after the other; None where labels are needed."""
    over = (step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)) % data[0].dim()
    found = [by_id.get(id(one)) for one in data]
    first = found[0]
    if len({*map(Tensor.dim, data)}) > 1:
        return None
    if first is not None and first.only is None and first.axis != over:
        alike = all(rows is not None and rows.index is first.index and rows.axis == first.axis for rows in found)
        return first if alike else None
    if any(rows is not None and rows.only is None and rows.axis != over for rows in found):
        return None
    sizes = tuple([one.shape[over] for one in data])

    def made() -> Rows | None:
        parts = []
        for rows, num in zip(found, sizes, strict=True):
            if rows is None:
                parts.append(step.identity.new_full((num,), NOBODY))
            else:
                parts.append(rows.index if rows.only is None else rows.index[:1].expand(num))
        return step.memo.owned(torch.cat(parts))

    rows = step.memo.get(("cat", sizes), tuple(found), None, made)
    return rows.moved(over) if isinstance(rows, Rows) else rows


def _reshaped(rows: Rows, before: torch.Size, after: torch.Size, step: Step) -> Owners:
    """Return the owners of the same entries, in the same order, in another shape.

    The labels of the leading axes are enough if their entries fill leading axes of the result: the rest keeps apart.
    """
    if rows.axis is None or after[: rows.axis + 1] == before[: rows.axis + 1]:
        return rows
    if len(before) == 1 <= len(after) and rows.num and rows.sole is not None and not rows.has_nobody:
        return Rows(0, rows.index[: after[0]])  # along the first axis as ever, though it may have one row
    for upto in range(rows.axis + 1, len(before) + 1):
        for lead in range(len(after) + 1):
            if after[:lead].numel() == before[:upto].numel():
                shape = (*after[:lead], *[1] * (len(after) - lead))
                return by_entry(rows.labels(before[:upto]).reshape(shape), step.memo.shared, "reshape")
    return by_entry(rows.labels(before).reshape(after), step.memo.shared, "reshape")


def picked(step: Step, name: str) -> Found:
    """Return the owners of constants that an index of data selects: the owners of the index."""
    if name == "__getitem__" and isinstance(step.args[1], tuple):
        return _picked_by_several(step)
    found = alone(step)
    if found is None:
        return MIXED
    tensor, rows = found
    if name == "__getitem__" and step.args[1] is tensor and tensor.dtype == torch.bool:
        return compressed(rows.labels(tensor.shape)[tensor], step.memo.shared)
    if name == "gather" or (name == "__getitem__" and step.args[1] is tensor):
        return rows
    if name == "index_select" and tensor.dim() == 1:
        return rows.moved(step.args[1] % step.out.dim())
    return MIXED


def _picked_by_several(step: Step) -> Found:
    """Return the owners of constants that adjacent indices of data, one per axis, select together."""
    parts, of = step.args[1], {id(tensor): rows for tensor, rows in step.owned}
    first = next(at for at, part in enumerate(parts) if isinstance(part, Tensor))
    index = [part for part in parts if isinstance(part, Tensor)]
    others = [*parts[:first], *parts[first + len(index) :]]
    if Ellipsis in parts[:first] or not all(part is None or part is Ellipsis or type(part) is slice for part in others):
        return MIXED
    if any(one.dtype == torch.bool for one in index):
        return MIXED
    owned = [(one.dim(), of[id(one)]) for one in index if id(one) in of]
    found = merged(owned, max(one.dim() for one in index), step.memo)
    return found.moved(first + found.axis) if isinstance(found, Rows) and found.axis is not None else found
