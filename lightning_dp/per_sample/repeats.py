"""Functions of parameters that repeat one row for all rows of the data, as the embedding of a type of all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.per_sample.arguments import replaced
from lightning_dp.per_sample.functions import derive
from lightning_dp.per_sample.nodes import Function

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracker import Tracker


def of_constants(tracker: Tracker, func: Any, args: Any, kwargs: Any, tensor: Tensor, *, follows: bool) -> Any:
    """Derive a function of parameters; if all rows of a constant are equal, derive it of one row and repeat that.

    Args:
        tracker: follows the parameters.
        func: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
        tensor: the constant among them.
        follows: whether each row of the result is computed from one row of the constant.
    """
    if not follows or len(tensor) < 2 or not bool((tensor == tensor[:1]).all()):
        return derive(tracker, func, args, kwargs)
    one = derive(tracker, func, *replaced(args, kwargs, lambda each: each[:1] if each is tensor else each))
    out = derive(tracker, torch.Tensor.repeat, (one, (len(tensor), *[1] * (one.dim() - 1))), {})
    if isinstance(out, Function):
        out.repeated = out.node, one
    return out


def one_of(tracker: Tracker, tensor: Tensor, axis: int) -> Tensor | None:
    """Return the one entry that a tensor repeats along an axis; None if it may have different ones."""
    if tensor.stride(axis) == 0:
        one: Tensor = derive(tracker, torch.narrow, (tensor, axis, 0, 1), {})
        return one
    node, repeated = getattr(tensor, "repeated", (None, None))
    return repeated if axis == 0 and node is not None and node is tracker.node_of(tensor) else None
