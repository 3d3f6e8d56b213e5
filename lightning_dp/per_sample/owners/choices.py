"""Operations that choose rows of samples by an index: other values of the data may choose other rows.

Two runs may then show equally many rows for each sample (records of full length, say) where others have fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.per_sample.owners.owned import Entries, Owners, Rows
from lightning_dp.per_sample.tracking.arguments import tensors_in

OwnersOf = Callable[[Tensor], Owners]

_ALWAYS = frozenset(("take", "_pack_padded_sequence", "nonzero", "argwhere"))
_ALONG_AN_AXIS = frozenset(("index_select", "gather", "take_along_dim"))
_SORTS = frozenset(("sort", "argsort"))
_JOINS = frozenset(("cat", "concat", "concatenate", "hstack", "vstack", "stack", "row_stack", "pad_sequence"))


def chooses_rows(name: str, args: Any, kwargs: Any, owners_of: OwnersOf, size: int) -> bool:
    """Tell whether an operation may give each sample another number of rows where the data has other values.

    Args:
        name: of the operation.
        args: its arguments.
        kwargs: the same, by name.
        owners_of: returns the owners of a tensor.
        size: number of samples.
    """
    if name in _JOINS:
        return any(not _holds_all_alike(owners_of(one), size) for one in tensors_in(args[:1], {}))
    given = args[2] if name == "__setitem__" else args[0] if args else None
    rows = owners_of(given) if isinstance(given, Tensor) else None
    if isinstance(rows, Entries) or not isinstance(rows, Rows) or rows.axis is None:
        return isinstance(rows, Entries)
    if name in _ALWAYS or (name == "where" and len(args) + len(kwargs) == 1):
        return True
    if name == "masked_select":  # a constant mask without an axis of rows selects as many of each
        mask, at = args[1] if len(args) > 1 else kwargs["mask"], args[0].dim() - rows.axis
        return owners_of(mask) is not None or (mask.dim() >= at and mask.shape[-at] != 1)
    if name in _SORTS:
        return bool(kwargs.get("dim", -1) % args[0].dim() == rows.axis)
    if name == "__setitem__":  # rows that are put where an index says
        parts: Any = args[1] if isinstance(args[1], tuple) else (args[1],)
        target = owners_of(args[0])
        if isinstance(target, Rows) and target.axis is not None:  # else any part may say where the rows go
            parts = _indices_at(args[1], target.axis, args[0].dim())
        return any(isinstance(part, (Tensor, list)) and _is_a_choice(part, rows, owners_of, size) for part in parts)
    if name == "repeat_interleave":
        return any(isinstance(one, Tensor) for one in (*args[1:], *kwargs.values()))
    if name in _ALONG_AN_AXIS:
        axis = kwargs.get("dim", next((one for one in args[1:] if isinstance(one, int)), None))
        return axis is None or axis % args[0].dim() == rows.axis
    return name == "__getitem__" and any(
        _is_a_choice(one, rows, owners_of, size) for one in _indices_at(args[1], rows.axis, args[0].dim())
    )


def chooses_by_others(name: str, args: Any, kwargs: Any, out: Any, owners_of: OwnersOf) -> bool:
    """Tell whether values of other samples choose among the rows of a sample.

    An index that permutes whole rows, as by their lengths, chooses nothing, and one that was computed from running sums
    of numbers of rows says where samples begin.

    Args:
        name: of the operation, one of those that select entries of their first argument.
        args: its arguments.
        kwargs: the same, by name.
        out: its result.
        owners_of: returns the owners of a tensor.
    """
    data = args[0]
    rows = owners_of(data)
    if not isinstance(rows, Rows):
        return False
    with unfollowed():
        if name == "__getitem__":
            placed = [*_placed(args[1], data.dim())]
        elif name == "masked_select":
            placed = [(data.dim() - one.dim(), one) for one in tensors_in(args[1:], kwargs)]
        else:
            axis = kwargs.get("dim", next((one for one in args[1:] if isinstance(one, int)), 0))
            placed = [(axis % max(1, data.dim()), one) for one in tensors_in(args[1:], kwargs)]
        return any(
            _is_by_others(index, at, rows, owners_of(index), owners_of(out))
            for at, index in placed
            if isinstance(index, Tensor) and isinstance(out, Tensor)
        )


def _is_by_others(index: Tensor, at: int, rows: Rows, owners: Owners, after: Owners) -> bool:
    """Tell whether an index that applies to axes from ``at`` on chooses rows of one sample by values of others."""
    if owners is None:
        return False
    if index.dtype in (torch.bool, torch.uint8):
        if not isinstance(owners, Rows) or (rows.axis is None) != (owners.axis is None):
            return True
        moved = owners.axis is not None and rows.axis != at + owners.axis
        return moved or not torch.equal(rows.index, owners.index)
    is_order = at == rows.axis and index.shape == (rows.num,)
    if is_order and torch.equal(index.sort()[0], torch.arange(rows.num, device=index.device)):
        return False
    if isinstance(owners, Rows):
        return not isinstance(after, Rows) or not torch.equal(after.index, owners.index)
    return not owners.is_running


def _placed(index: Any, num_axes: int) -> Iterator[tuple[int, Any]]:
    """Yield the parts of an index, each with the first axis that it applies to."""
    parts = _parts_of(index)
    named, at = sum(_num_axes(part) for part in parts), 0
    for part in parts:
        yield at, part
        at += num_axes - named if part is Ellipsis else _num_axes(part)


def _holds_all_alike(owners: Owners, size: int) -> bool:
    """Tell whether a tensor holds equally many rows of every sample, or none."""
    if not isinstance(owners, Rows):
        return True
    counts = torch.bincount(owners.index.clamp_min(0), minlength=size)
    return owners.axis is not None and bool((counts == counts[:1]).all())


def _indices_at(index: Any, axis: int, num_axes: int) -> Iterator[Any]:
    """Yield the part of an index that applies to an axis."""
    placed = [*_placed(index, num_axes)]
    ends = [*(at for at, _ in placed[1:]), num_axes]
    for (at, part), end in zip(placed, ends, strict=True):
        if at <= axis < end:
            yield part


def _parts_of(index: Any) -> tuple[Any, ...]:
    # torch reads a list with slices as a tuple
    is_several = isinstance(index, tuple) or (isinstance(index, list) and slice in map(type, index))
    return tuple(index) if is_several else (index,)


def _num_axes(part: Any) -> int:
    """Return the number of axes that a part of an index applies to; an ellipsis and a new axis have none."""
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _is_a_choice(part: Any, rows: Rows, owners_of: OwnersOf, size: int) -> bool:
    whole = len(rows.index) == size
    if isinstance(part, range):
        return not (whole and part == range(size))
    if isinstance(part, slice):
        return not whole and part != slice(None)
    if not isinstance(part, Tensor):
        return part is not Ellipsis and not isinstance(part, int)
    return not (whole and part.dtype != torch.bool and owners_of(part) is None and part.numel() == size)
