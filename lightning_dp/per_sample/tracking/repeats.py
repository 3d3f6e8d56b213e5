"""Functions of parameters that repeat one row: for all rows of the data, as the embedding of a type of all tokens, or
for all samples, as the first state of a loop over time.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import in_backward
from lightning_dp.per_sample.layout import BatchAxis
from lightning_dp.per_sample.owners.owned import OwnedAxis, Rows
from lightning_dp.per_sample.tracking import leaves
from lightning_dp.per_sample.tracking.arguments import replaced
from lightning_dp.per_sample.tracking.functions import derive
from lightning_dp.per_sample.tracking.nodes import Function, Node
from lightning_dp.per_sample.tracking.uses import Use, tap

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


_REPEATS = ("expand", "repeat")  # "expand_as" has the shape of another parameter here, whatever the number of samples


class Repeats:
    """The shapes of repeated functions of parameters, by operation and by number of samples, of the runs that learn.

    They tell samples from other things of which a batch has as many: an axis runs over the samples if it had their
    number in all of these runs.
    """

    def __init__(self) -> None:
        self.learns = False
        self._seen: dict[Hashable, dict[int, set[torch.Size]]] = {}

    def clear(self) -> None:
        """Forget all runs."""
        self._seen = {}

    def note(self, key: Hashable, shape: torch.Size, size: int) -> None:
        """Record a shape in a run on that many samples."""
        self._seen.setdefault((key, len(shape)), {}).setdefault(size, set()).add(shape)

    def are_samples(self, key: Hashable, shape: torch.Size, axis: int) -> bool:
        """Tell whether an axis runs over the samples, and not over other things in any use of this shape."""
        seen = self._seen.get((key, len(shape)), {})
        follows = len(seen) > 1 and all(any(one[axis] == size for one in shapes) for size, shapes in seen.items())
        return follows and not all(shape in shapes for shapes in seen.values())


def repeated_for_samples(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on parameters alone; if it repeats one for every sample, each sample gets a copy of its own."""
    out, size = derive(tracker, func, args, kwargs), tracker.recorder.batch_size
    if func.__name__ not in _REPEATS or not isinstance(out, Function) or size == 0:
        return out
    assert tracker.follower is not None
    if size == 1:  # whatever a batch of one sample repeats is of this sample
        one = tracker.follower.identity(out.device)
        copies = copy_of(tracker, out, out.node, out.detach(), OwnedAxis(None, one))
        tracker.follower.note(copies, Rows(None, one))
        return copies
    key, repeats = (func.__name__, out.node.lineage), tracker.repeats
    if repeats.learns:
        repeats.note(key, out.shape, size)
    before = (1,) * (out.dim() - args[0].dim()) + tuple(args[0].shape)
    for axis in range(out.dim()):
        if before[axis] != 1 or out.shape[axis] != size:
            continue
        if repeats.learns or repeats.are_samples(key, out.shape, axis):
            one = derive(tracker, torch.narrow, (out, axis, 0, 1), {})
            value = leaves.along(one.detach(), one.shape, axis, size)
            value = value if func.__name__ in leaves.VIEWS else value.contiguous()
            copies = copy_of(tracker, one, one.node, value, BatchAxis(axis))
            tracker.follower.note(copies, tracker.follower.samples(copies.device).moved(axis))
            tracker.follower.assumed.add(copies)
            return copies
    return out


def copy_of(tracker: Tracker, tensor: Tensor, node: Node, value: Tensor, axis: OwnedAxis | BatchAxis) -> Tensor:
    """Connect expanded copies of a tensor to the tensor's source, which receives their gradient; return the copies."""
    source = tracker.source(leaves.LEAF, node.shape, "copies", {"copy": node})
    if not in_backward():
        source.calls += 1
    return tap(value, Use(source, (), None, axis))


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
