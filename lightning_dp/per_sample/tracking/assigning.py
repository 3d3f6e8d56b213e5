"""Functions of parameters that are written into tensors of data, as a mask token into hidden states.

Each function takes the tracker, the torch function, and that function's arguments.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import is_mapped, is_view, unfollowed
from lightning_dp.per_sample.owners.owned import Rows
from lightning_dp.per_sample.tracking.composites import rows
from lightning_dp.per_sample.tracking.nodes import is_tracked

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


def setitem(tracker: Tracker, func: Any, tensor: Any, index: Any, value: Any) -> Any:
    """Write a function of parameters into a tensor of data, through ``torch.where`` if tensors are the index."""
    if is_tracked(tensor) or not is_tracked(value):
        return tracker.primitive(func, (tensor, index, value), {})
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        where, lead = index, value.shape[: value.dim() - (tensor.dim() - index.dim())]
        number = (index.flatten().cumsum(0) - 1).clamp(min=0).view(index.shape) if lead and lead[0] != 1 else None
    elif (found := _entries(tracker, tensor, index, value.shape)) is not None:
        where, number = found
    else:
        target = tensor[index]
        if not is_view(target):
            return tracker.primitive(func, (tensor, index, value), {})
        target.copy_(value)
        return None
    if not value.numel():
        return None
    rest = tensor.dim() - where.dim()
    if value.dim() > rest:
        row = value.shape[value.dim() - rest :]
        value = value.reshape(row) if number is None else rows(value.reshape(-1, *row), number)
    tensor.copy_(torch.where(where.reshape(*where.shape, *[1] * rest), value, tensor))
    return None


def index_put_(tracker: Tracker, func: Any, tensor: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    """Write a function of parameters at indices."""
    if accumulate or is_tracked(tensor) or not is_tracked(values):
        return tracker.primitive(func, (tensor, indices, values, accumulate), {})
    setitem(tracker, Tensor.__setitem__, tensor, tuple(indices), values)
    return tensor


def masked_fill(tracker: Tracker, func: Any, input: Any, mask: Any, value: Any) -> Any:
    """Write a number that is a function of parameters where a mask is true."""
    if not is_tracked(value):
        return tracker.primitive(func, (input, mask, value), {})
    filled = torch.where(mask, value, input)
    return input.copy_(filled) if func.__name__.endswith("_") else filled


def _entries(tracker: Tracker, tensor: Tensor, index: Any, shape: torch.Size) -> tuple[Tensor, Tensor | None] | None:
    """Return what an index with tensors writes to, as a mask over the first axes, and the row of the value that each
    entry gets, None for one row; return None if no tensor is in the index.

    Args:
        tracker: follows the owners of rows, perhaps: each entry of the mask has those of what is written to.
        tensor: receives the value.
        index: as for ``tensor[index]``.
        shape: of the value.
    """
    given = index if isinstance(index, tuple) else (index,)
    parts = [torch.as_tensor(one, device=tensor.device) if _is_array(one) else one for one in given]
    arrays = [one for one in parts if isinstance(one, Tensor)]
    if not arrays or any(one is None for one in parts) or any(map(is_mapped, arrays)):
        return None
    if (at := next((i for i, one in enumerate(parts) if one is Ellipsis), None)) is not None:
        parts[at : at + 1] = [slice(None)] * (tensor.dim() - sum(map(_num_axes, parts)) + 1)
    while isinstance(parts[-1], slice) and parts[-1] == slice(None):
        parts.pop()
    lead = tensor.shape[: sum(map(_num_axes, parts))]
    own = shape[: max(0, len(shape) - tensor.dim() + len(lead))]
    with unfollowed():
        written = torch.arange(math.prod(lead), device=tensor.device).view(lead)[tuple(parts)]
        where = torch.zeros(math.prod(lead), dtype=torch.bool, device=tensor.device)
        where[written.flatten()] = True
        number = torch.zeros_like(where, dtype=torch.long)
        number[written.flatten()] = (
            torch.arange(math.prod(own), device=tensor.device).view(own).expand_as(written).flatten()
        )
        where, number = where.view(lead), number.view(lead)
    if (follower := tracker.follower) is not None:
        owners = follower.owners_of(tensor)
        is_constant = owners is None and all(follower.owners_of(one) is None for one in arrays)
        if is_constant or (isinstance(owners, Rows) and owners.axis is not None and owners.axis < len(lead)):
            follower.note(where, owners)
            follower.note(number, owners)
    return where, number if math.prod(own) != 1 else None


def _is_array(one: Any) -> bool:
    return isinstance(one, (list, Tensor)) or hasattr(one, "__array__")


def _num_axes(part: Any) -> int:
    """Return the number of axes that a part of an index covers."""
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1
