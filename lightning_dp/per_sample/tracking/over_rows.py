"""Operations without a rule on rows of known samples: mapped over the rows, or with parameters' entries as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.per_sample.layout import BatchAxis, CallLayout
from lightning_dp.per_sample.owners.owned import OwnedAxis, Rows
from lightning_dp.per_sample.tracking import mapping
from lightning_dp.per_sample.tracking.arguments import replaced
from lightning_dp.per_sample.tracking.functions import derive
from lightning_dp.per_sample.tracking.nodes import Node
from lightning_dp.per_sample.tracking.operations import operation_of
from lightning_dp.per_sample.tracking.repeats import copy_of

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


def run(func: Any, args: Any, kwargs: Any, own: Mapping[int, Tensor]) -> Any:
    """Run an operation with other tensors in place of some of its own, by the identity of these."""
    args, kwargs = replaced(args, kwargs, lambda tensor: own.get(id(tensor), tensor))
    return func(*args, **kwargs)


def axis_of(rows: Rows) -> OwnedAxis | BatchAxis:
    """Return the axis along which rows have owners."""
    assert rows.axis is not None
    return BatchAxis(rows.axis) if rows.is_identity else OwnedAxis(rows.axis, rows.index, rows.layout)


def by_row(tracker: Tracker, tensor: Tensor, node: Node, rows: Rows) -> Tensor:
    """Return a function of parameters that has an entry for each row of the data as data: row r belongs to the sample
    of row r that it meets, as if it were read from a table.
    """
    assert tracker.follower is not None
    assert rows.axis is not None
    index = torch.arange(rows.num, device=tensor.device)
    tracker.follower.note(index, rows.moved(0))
    table = derive(tracker, torch.movedim, (tensor, rows.axis, 0), {})
    flat = derive(tracker, torch.reshape, (table, (rows.num, -1)), {})
    read = operation_of(F.embedding)
    assert read is not None
    found: Tensor = read.run(tracker, F.embedding, (index, flat), {})
    return found.view(table.shape).movedim(0, rows.axis)


def over_rows(
    tracker: Tracker,
    func: Any,
    args: Any,
    kwargs: Any,
    tensors: Sequence[Tensor],
    tracked: list[tuple[Tensor, Node]],
    found: Sequence[tuple[Tensor, Any]],
) -> Any:
    """Map an operation over rows, each with copies of the parameters; refuse it where its rows are not those of its
    data.
    """
    follower, nodes = tracker.follower, [node for _, node in tracked]
    assert follower is not None
    values = {id(tensor): tensor.detach() for tensor, _ in tracked}
    for value in values.values():
        follower.note(value, None)
    shape, result = follower.result(func, *replaced(args, kwargs, lambda tensor: values.get(id(tensor), tensor)))
    if not isinstance(result, Rows) or result.axis is None:
        return tracker.unbatched(func, nodes)
    of, axes, num = {id(tensor): rows for tensor, rows in found}, [], result.index.shape[0]
    for tensor in tensors:
        rows = of.get(id(tensor))
        if rows is not None and (rows.axis is None or not torch.equal(rows.index, result.index)):
            return tracker.unbatched(func, nodes)
        axes.append(None if rows is None else BatchAxis(rows.axis))
    ofs = [None if axis is None else axis.axis for axis in axes]
    if not _fits_rows(func, args, kwargs, dict(zip(map(id, tensors), ofs, strict=True)), shape, result.axis):
        made = _with_rows(tracker, func, args, kwargs, tracked, result)
        return tracker.unbatched(func, nodes) if made is None else made
    own = {
        id(t): copy_of(tracker, t, node, t.detach().expand(num, *t.shape), axis_of(result.moved(0)))
        for t, node in tracked
    }
    plan = CallLayout(tuple(axes), (BatchAxis(result.axis),))
    return mapping.over_rows(func, args, kwargs, plan, own, tensors, num, nodes)


def _fits_rows(func: Any, args: Any, kwargs: Any, axes: Mapping[int, int | None], shape: Any, axis: int) -> bool:
    """Tell whether an operation on one row gives one row of its result: else parameters have entries for each row.

    Args:
        func: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
        axes: row axis of each tensor by its identity; None for parameters and constants.
        shape: of the result for all rows.
        axis: of the rows in it.
    """

    def first(tensor: Tensor) -> Tensor:
        of = axes[id(tensor)]
        return tensor.detach() if of is None else tensor.detach().narrow(of, 0, 1).clone()  # it may be written to

    with torch.no_grad(), unfollowed():
        try:
            one = func(*replaced(args, kwargs, first)[0], **replaced(args, kwargs, first)[1])
        except Exception:  # it needs as many rows as there are
            return False
    return bool(one.shape == (*shape[:axis], 1, *shape[axis + 1 :]))


def _with_rows(
    tracker: Tracker, func: Any, args: Any, kwargs: Any, tracked: list[tuple[Tensor, Node]], result: Rows
) -> Any:
    """Run an operation on functions of parameters that have an entry for each row, as on data of the samples of these
    rows; return None if it does not keep these rows apart.
    """
    follower, axis = tracker.follower, result.axis
    assert follower is not None
    assert axis is not None
    if any(tensor.dim() <= axis or tensor.shape[axis] != result.num for tensor, _ in tracked):
        return None
    values = {id(tensor): tensor.detach().clone() for tensor, _ in tracked}
    for value in values.values():
        follower.note(value, result)
    _, found = follower.result(func, *replaced(args, kwargs, lambda tensor: values.get(id(tensor), tensor)))
    if not isinstance(found, Rows) or found.axis != axis or not torch.equal(found.index, result.index):
        return None
    return run(func, args, kwargs, {id(t): by_row(tracker, t, node, result) for t, node in tracked})
