"""Uses without a rule: each sample gets its own copy of the parameter, whose gradient is the sample's gradient.

Elementwise operations broadcast the copies along the batch axis of their output; every other operation is mapped over
the samples, see ``mapping.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.per_sample._torch import in_backward, is_mapped
from lightning_dp.per_sample.layout import BatchAxis, CallLayout
from lightning_dp.per_sample.owners.owned import Rows
from lightning_dp.per_sample.rules.base import Call, Rule, sum_rows, widen
from lightning_dp.per_sample.tracking.arguments import replaced, tensors_in
from lightning_dp.per_sample.tracking.functions import derive
from lightning_dp.per_sample.tracking.nodes import Function, Node, Reporting
from lightning_dp.per_sample.tracking.uses import FEW, Use, tap_copies
from lightning_dp.system.torch_private import num_changes

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


class LeafRule(Rule):
    """The rule of expanded copies, whose gradients are the per-sample gradients. Its spec is the tensor's shape."""

    @override
    def per_sample(self, module: Any, calls: Sequence[Call], batch_size: int, names: set[str]) -> dict[str, Tensor]:
        total: Tensor | None = None
        for call in calls:
            # of a complex function of parameters the gradient is complex
            grads = call.backprop if call.backprop.is_complex() else widen(call.backprop)
            grads = sum_rows(grads.reshape(len(grads), *module), call.multiplicity)
            total = grads if total is None else total + grads
        assert total is not None
        return {"copy": total}


LEAF = LeafRule()
_rows = functools.cache(BatchAxis)
VIEWS = frozenset(("expand", "expand_as", "broadcast_to"))
"""Operations that repeat entries without a copy of them; the result of others may be viewed in any shape."""
_SUMS = {"add", "add_", "sub", "sub_", "subtract", "subtract_", "rsub"}
_SUMS |= {"__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__"}
"""Names of operations that are linear in what is added."""
_BLOCKS = 4  # least number of blocks of a parameter, and largest ratio to those used, to copy all of them


def padded_shape(shape: Sequence[int], axis: BatchAxis, num_axes: int) -> tuple[int, ...] | None:
    """Return a shape padded with ones on the left to ``num_axes`` axes; None if the tensor varies along the
    batch axis.
    """
    padded = (1,) * (num_axes - len(shape)) + tuple(shape)
    return padded if len(padded) == num_axes and padded[axis.axis] == 1 else None


def along(value: Tensor, padded: Sequence[int], axis: int, size: int) -> Tensor:
    """Expand a tensor to ``size`` copies along an axis that has length 1 in its padded shape."""
    shape = list(padded)
    shape[axis] = size
    return value.reshape(padded).expand(shape)


def rows_along(copies: Tensor, axis: BatchAxis, rows: int) -> Tensor:
    """Repeat each sample's copy for the ``K`` rows of the sample, in the order of the rows."""
    if rows == 1:
        return copies
    at = axis.axis + (1 if axis.sample_major else 0)
    copies = copies.unsqueeze(at)
    shape = list(copies.shape)
    shape[at] = rows
    return copies.expand(shape).flatten(axis.axis, axis.axis + 1)


def constant(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on detached parameters, because an empty batch has no gradients."""
    args, kwargs = replaced(args, kwargs, lambda tensor: tensor.detach() if isinstance(tensor, Reporting) else tensor)
    return func(*args, **kwargs)


def copies_of(
    tracker: Tracker, tensor: Tensor, node: Node, make: Callable[[Tensor], Tensor], axis: BatchAxis
) -> Tensor:
    """Return copies that ``make`` expands from a detached leaf; the tensor's source receives their gradient."""
    source = tracker.source(LEAF, node.shape, "copies", {"copy": node})
    if not in_backward():
        source.calls += 1
    return tap_copies(make(tensor.detach().requires_grad_()), Use(source, (), None, axis))


def aligned(
    tracker: Tracker,
    func: Any,
    args: Any,
    kwargs: Any,
    plan: CallLayout,
    tracked: list[tuple[Tensor, Node]],
    tensors: Sequence[Tensor],
) -> Any:
    """Run an elementwise operation on copies of parameters; return ``NotImplemented`` if the copies do not
    broadcast.
    """
    axis, size = plan.outputs[0], tracker.recorder.batch_size
    assert isinstance(axis, BatchAxis)
    num_axes = max(tensor.dim() for tensor in tensors)
    if axis.axis >= num_axes:
        return NotImplemented
    padded = {id(t): padded_shape(t.shape, axis, num_axes) for t, _ in tracked}
    if any(shape is None for shape in padded.values()):
        return NotImplemented
    plain = [tensor for tensor in tensors if id(tensor) not in padded]
    lengths = {tensor.shape[at] for tensor in plain if (at := axis.axis - num_axes + tensor.dim()) >= 0}
    rows = axis.rows_in(max(lengths, default=0), size, func.__name__)
    wide = next((tensor for tensor in plain if tensor.dim() and tensor.is_floating_point()), None)

    def copies(tensor: Tensor, node: Node) -> Tensor:
        shape = padded[id(tensor)]
        assert shape is not None
        dtype = torch.result_type(wide, tensor) if tensor.dim() == 0 and wide is not None else tensor.dtype
        held = node.is_view and tensor.data_ptr(), num_changes(tensor)
        key = (node.key, held, tensor.dtype, shape, axis.axis, axis.sample_major, rows, dtype)
        shared: Tensor | None = None if in_backward() else tracker.copies.get(key)
        if shared is not None:
            return shared
        made = _block(tracker, tensor, node, shape, axis.axis, size)
        if made is None:
            made = copies_of(tracker, tensor, node, lambda v: along(v, shape, axis.axis, size), _rows(axis.axis))
        if dtype != tensor.dtype:  # a number does not decide the type of a result
            made = made.to(dtype)
        made = rows_along(made, axis, rows)
        if not in_backward():
            tracker.copies[key] = made
        return made

    own = {id(tensor): copies(tensor, node) for tensor, node in tracked}
    args, kwargs = replaced(args, kwargs, lambda t: own.get(id(t), t))
    return func(*args, **kwargs)


def is_penalty(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether a function of parameters is added to the loss of a batch: both are scalars with a gradient.

    The loss of one sample keeps a penalty that is added to it.
    """
    if func.__name__ not in _SUMS:
        return False
    tensors = tensors_in(args, kwargs)
    if any(tensor.dim() or is_mapped(tensor) for tensor in tensors):
        return False
    losses = [tensor for tensor in tensors if tensor.requires_grad and tracker.node_of(tensor) is None]
    follower = tracker.follower
    return bool(losses) and not (follower and any(isinstance(follower.owners_of(one), Rows) for one in losses))


def spread_evenly(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """Add a penalty on parameters to the mean loss of a batch: ``loss + mean_i(penalty_i)``, with a copy per sample."""
    size = tracker.recorder.batch_size
    if tracker.observer is not None or size == 0:
        return constant(tracker, func, args, kwargs)
    nodes = {id(tensor): (tensor, tracker.node_of(tensor)) for tensor in tensors_in(args, kwargs)}
    own = {
        key: copies_of(tracker, tensor, node, lambda value: value.expand(size), _rows(0)).mean()
        for key, (tensor, node) in nodes.items()
        if node is not None
    }
    args, kwargs = replaced(args, kwargs, lambda tensor: own.get(id(tensor), tensor))
    return func(*args, **kwargs)


def _block(tracker: Tracker, tensor: Tensor, node: Node, padded: Sequence[int], axis: int, size: int) -> Tensor | None:
    """Return the copies of a block of a small parameter whose blocks are used one by one, as ``w[i, j]`` in a loop.

    The copies of all blocks are made together, and so are their gradients. None for other tensors, and before uses of
    blocks have covered a quarter of the parameter.
    """
    name, num = node.names[0], node.numel
    if node.region is None or not num or in_backward():
        return None
    parameter, offset = tracker.parameters[name], node.region[0]
    whole, rest = divmod(parameter.numel(), num)
    if rest or offset % num or whole < _BLOCKS or size * whole * num > FEW or not tensor.is_contiguous():
        return None
    used = tracker.blocks.setdefault((name, num), set())
    used.add(offset)
    key = (name, num, parameter.data_ptr(), num_changes(parameter))  # autograd refuses these views after a change
    if _BLOCKS * len(used) < whole or tensor.data_ptr() != key[2] + offset * tensor.itemsize:
        return None
    if key not in tracker.copies:
        of_parameter = tracker.known_node(parameter)
        assert of_parameter is not None
        tracker.copies[key] = copies_of(
            tracker, parameter, of_parameter, lambda v: v.reshape(whole, 1, num).expand(whole, size, num), _rows(1)
        ).unbind()
    block: Tensor = tracker.copies[key][offset // num]
    return block.reshape(size, *padded[:axis], *padded[axis + 1 :]).movedim(0, axis)


def spread(tracker: Tracker, func: Any, args: Any, kwargs: Any, plan: CallLayout | None) -> Any:
    """Run an operation whose result repeats a function of parameters for every sample, such as ``expand``."""
    assert plan is not None
    axis, size = plan.outputs[0], tracker.recorder.batch_size
    assert isinstance(axis, BatchAxis)
    if size == 0:
        return constant(tracker, func, args, kwargs)
    at = axis.axis
    one = _repeated_once(func, args, kwargs, at, size)
    if one is not None:
        one = derive(tracker, func, *one)
    else:
        whole = derive(tracker, func, args, kwargs)
        if not isinstance(whole, Function):
            return whole
        rows = axis.rows_of_one(whole, size, func.__name__)
        if axis.sample_major:
            one = derive(tracker, torch.narrow, (whole, at, 0, rows), {})
        else:
            one = derive(
                tracker, torch.select, (derive(tracker, torch.unflatten, (whole, at, (rows, size)), {}), at + 1, 0), {}
            )
    node = tracker.node_of(one)
    assert node is not None
    along = at if axis.sample_major else at + 1

    def copies(value: Tensor) -> Tensor:
        return value.unsqueeze(along).expand(*value.shape[:along], size, *value.shape[along:])

    made = copies_of(tracker, one, node, copies, BatchAxis(along)).flatten(at, at + 1)
    return made if func.__name__ in VIEWS else made.contiguous()


def _repeated_once(func: Any, args: Any, kwargs: Any, axis: int, size: int) -> tuple[Any, Any] | None:
    """Return arguments with which ``repeat`` or ``expand`` gives the rows of one sample; None for other calls."""
    if func.__name__ not in ("repeat", "expand") or kwargs:
        return None
    sizes = [*args[1]] if len(args) == 2 and not isinstance(args[1], int) else [*args[1:]]
    if func.__name__ == "expand" and sizes[axis] != size:
        return None
    sizes[axis] //= size
    return (args[0], *sizes), {}
