"""Uses of parameters while the owners of rows are followed: the counterparts of the methods of ``Tracker``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import WAY_OUT, BatchAxis, CallLayout
from lightning_dp.per_sample.owners.memo import merged
from lightning_dp.per_sample.owners.owned import NOBODY, Mixed, OwnedAxis, Rows
from lightning_dp.per_sample.owners.traits import Traits, traits_of
from lightning_dp.per_sample.rules.base import Rule
from lightning_dp.per_sample.tracking import leaves, twice
from lightning_dp.per_sample.tracking.functions import derive
from lightning_dp.per_sample.tracking.nodes import Node, named
from lightning_dp.per_sample.tracking.operations import ALIGNED, Bound
from lightning_dp.per_sample.tracking.over_rows import axis_of, by_row, over_rows, run
from lightning_dp.per_sample.tracking.repeats import copy_of, of_constants, one_of, repeated_for_samples
from lightning_dp.per_sample.tracking.uses import Use

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


def use(
    tracker: Tracker, func: Any, args: Any, kwargs: Any, rule: Rule, bound: Bound, nodes: Mapping[str, Node]
) -> Any:
    """Run an operation that has a rule, while the owners of rows are followed."""
    assert tracker.follower is not None
    (tensor, _, _), spec, _ = bound
    rows = tracker.follower.owners_of(tensor)
    if isinstance(rows, Mixed):
        return _refuse(func, nodes.values(), rows)
    rows = compare(tracker, func, nodes.values(), rows, (tensor,))
    if rows is None:
        return of_constants(tracker, func, args, kwargs, tensor, follows=rule.follows(spec, 0, tensor.dim()))
    axis = _axis_for(rule, spec, rows, tensor)
    if axis is None:
        if rows.has_nobody and rows.axis is not None and rule.follows(spec, rows.axis, tensor.dim()):
            return _refuse_nobody(func, nodes.values())
        return tracker.unbatched(func, nodes.values())
    made = Use(tracker.source(rule, spec, func.__name__, nodes), (tensor,), axis, axis)
    return twice.recorded(tracker, func, args, kwargs, bound, nodes, made)


def compare(
    tracker: Tracker, func: Any, nodes: Iterable[Node], rows: Rows | None, tensors: Iterable[Tensor]
) -> Rows | None:
    """Set the order of a use's rows where it is unknown; count the use where positions name other samples than owners,
    and take note of rows that data choose.

    Args:
        tracker: compares only while the layout is learned.
        func: the operation.
        nodes: its parameters.
        rows: owners; None where it sees no samples.
        tensors: its arguments.

    Returns:
        The rows, of which those that no sample's data are in, such as noise next to the data, have the owners that
        positions name, if these name all other owners.
    """
    if not tracker.compares or rows is None:
        return rows
    assert tracker.follower is not None
    tracker.chooses_rows |= any(tensor in tracker.follower.chosen for tensor in tensors)
    placed = [_placed(tracker, (func.__name__, node.lineage), rows) for node in nodes]
    tracker.num_misplaced += placed.count(None)
    if None in placed or rows.axis is None or not rows.has_nobody:
        return rows
    tracker.owns_by_position = True
    return placed[0]


def _placed(tracker: Tracker, key: tuple[str, int], rows: Rows) -> Rows | None:
    """Return the owners that the positions that were learned name; None if they are not those of the rows that somebody
    owns. Set an unknown order.
    """
    assert tracker.learned is not None
    index, size = tracker.index_of(key), tracker.recorder.batch_size
    if index is None:  # a recomputation: its use was compared before
        return rows
    layout = tracker.learned.layout(key, index)
    axis = next((one for one in layout.inputs if isinstance(one, BatchAxis)), None) if layout is not None else None
    if layout is None or axis is None or rows.axis is None or rows.index.shape[0] != size * axis.multiplicity:
        return None
    identity, nobody = torch.arange(size, device=rows.index.device), rows.index == NOBODY
    orders = {True: identity.repeat_interleave(axis.multiplicity), False: identity.repeat(axis.multiplicity)}
    fitting = [order for order, owners in orders.items() if bool(((rows.index == owners) | nobody).all())]
    if len(fitting) == 1:
        for unordered in layout.unordered:
            unordered.set_order(fitting[0])
    if (order := axis.sample_major is not False) in fitting and not layout.unordered:
        return Rows(rows.axis, orders[order])
    tracker.contradicted = tracker.contradicted or tracker.learned.labels.get(key, key[0])
    return None


def _refuse(func: Any, nodes: Iterable[Node], rows: Mixed) -> NoReturn:
    raise PrivacyError(
        f"Expected {func.__name__} of {named(nodes)} to meet rows of known samples, got rows that come from {rows.by}. "
        f"Give the sample of each row as 'sample_of_row' in the batch or on the module; {WAY_OUT}."
    )


def _refuse_nobody(func: Any, nodes: Iterable[Node]) -> NoReturn:
    raise PrivacyError(
        f"Expected {func.__name__} of {named(nodes)} to meet rows of known samples, got some that no sample's "
        "data are in, such as padding, noise or fakes of a fixed number, or sums to which nothing was added. Make as "
        f"many for each record, from the record, as in 0 * targets in place of zeros; {WAY_OUT}."
    )


def _axis_for(rule: Rule, spec: Any, rows: Rows, tensor: Tensor) -> OwnedAxis | BatchAxis | None:
    """Return the row axis in the form that a rule needs; None if the rule cannot handle the axis."""
    if rows.axis is not None and rule.follows(spec, rows.axis, tensor.dim()):
        if rows.is_identity:
            return BatchAxis(rows.axis)
        return None if rows.has_nobody else OwnedAxis(rows.axis, rows.index, rows.layout)
    if rows.only is None:
        return None
    if tensor.dim() and rule.follows(spec, 0, tensor.dim()):
        return OwnedAxis(0, rows.index[:1].expand(tensor.shape[0]))
    return OwnedAxis(None, rows.index[:1])


def general(
    tracker: Tracker,
    func: Any,
    args: Any,
    kwargs: Any,
    tensors: Sequence[Tensor],
    tracked: list[tuple[Tensor, Node]],
) -> Any:
    """Run an operation that has no rule, while the owners of rows are followed."""
    follower = tracker.follower
    assert follower is not None
    mine = {id(tensor): node for tensor, node in tracked}
    found = [(tensor, follower.owners_of(tensor)) for tensor in tensors if id(tensor) not in mine]
    owned = [(tensor, rows) for tensor, rows in found if isinstance(rows, Rows)]
    num_axes = max(tensor.dim() for tensor in tensors)
    rows = merged([(tensor.dim(), rows) for tensor, rows in owned], num_axes, follower.memo)
    has_nobody = isinstance(rows, Rows) and rows.has_nobody
    rows = compare(tracker, func, mine.values(), rows, tensors) if isinstance(rows, Rows) else rows
    for _, unknown in found:
        if isinstance(unknown, Mixed):
            return _refuse(func, mine.values(), unknown)
    if not owned:
        return derive(tracker, func, args, kwargs) if found else repeated_for_samples(tracker, func, args, kwargs)
    one = {rows.only for _, rows in owned}
    if len(one) == 1 and None not in one:  # the whole tensor belongs to one sample
        axis = OwnedAxis(None, owned[0][1].index[:1])
        own = {id(t): copy_of(tracker, t, node, t.detach().view_as(t), axis) for t, node in tracked}
        return run(func, args, kwargs, own)
    if not isinstance(rows, Rows) or rows.axis is None:
        return tracker.unbatched(func, mine.values())
    if rows.has_nobody:
        return _refuse_nobody(func, mine.values())
    traits = traits_of(func)
    if traits.in_place and id(tensors[0]) in mine:  # not the tensor itself would change
        return tracker.unbatched(func, mine.values())
    repeated = _repeated(tracker, tracked, rows, num_axes)
    if func.__name__ in ALIGNED or _joins_along_others(traits, rows.axis, args, kwargs, owned[0][0]):
        copies = _aligned(tracker, tracked, rows, num_axes, [tensor for tensor, _ in owned], repeated)
        if copies is not None:
            return run(func, args, kwargs, copies)
    if len(repeated) == len(tracked):
        return run(func, args, kwargs, repeated)
    if has_nobody:
        return _refuse_nobody(func, mine.values())
    return over_rows(tracker, func, args, kwargs, tensors, tracked, found)


def _aligned(
    tracker: Tracker,
    tracked: list[tuple[Tensor, Node]],
    rows: Rows,
    num_axes: int,
    data: list[Tensor],
    repeated: Mapping[int, Tensor],
) -> dict[int, Tensor] | None:
    """Return copies of parameters that broadcast along the rows; None if a parameter varies along this axis."""
    assert rows.axis is not None
    wide = next((tensor for tensor in data if tensor.dim() and tensor.is_floating_point()), None)
    copies = {}
    for tensor, node in tracked:
        if id(tensor) in repeated:
            copies[id(tensor)] = repeated[id(tensor)]
            continue
        padded = (1,) * (num_axes - tensor.dim()) + tuple(tensor.shape)
        if padded[rows.axis] == rows.num > 1:
            copies[id(tensor)] = by_row(tracker, tensor, node, rows.moved(rows.axis - num_axes + tensor.dim()))
            continue
        if padded[rows.axis] != 1:
            return None
        made = copy_of(
            tracker, tensor, node, leaves.along(tensor.detach(), padded, rows.axis, rows.index.shape[0]), axis_of(rows)
        )
        if tensor.dim() == 0 and wide is not None:
            made = made.to(torch.result_type(wide, tensor))
        copies[id(tensor)] = made
    return copies


def _joins_along_others(traits: Traits, axis: int, args: Any, kwargs: Any, data: Tensor) -> bool:
    """Tell whether an operation puts tensors together along another axis than that of the rows."""
    after = traits.axis_after
    return traits.joins and after is not None and after(data, axis, args, kwargs, data) is not None


def _repeated(tracker: Tracker, tracked: list[tuple[Tensor, Node]], rows: Rows, num_axes: int) -> dict[int, Tensor]:
    """Return copies of tensors with one entry for all rows, as ``token.expand(B, -1, -1)`` or a type of all tokens."""
    copies: dict[int, Tensor] = {}
    axis, num = rows.axis, rows.index.shape[0]
    assert axis is not None
    for tensor, _ in tracked:
        one = one_of(tracker, tensor, axis) if tensor.dim() == num_axes and tensor.shape[axis] == num > 1 else None
        if one is not None:
            node = tracker.node_of(one)
            assert node is not None
            copies[id(tensor)] = copy_of(
                tracker, one, node, leaves.along(one.detach(), one.shape, axis, num), axis_of(rows)
            )
    return copies


def plan_of(tracker: Tracker, func: Any, node: Node, tensors: Sequence[Tensor]) -> CallLayout | None:
    """Return the layout of a registered operation; its result has the row axis of the first data tensor."""
    assert tracker.follower is not None
    owners = [tracker.follower.owners_of(tensor) for tensor in tensors]
    for owner in owners:
        if isinstance(owner, Mixed):
            _refuse(func, [node], owner)
    axes = [axis_of(owner) if isinstance(owner, Rows) and owner.axis is not None else None for owner in owners]
    first = next((axis for axis in axes if axis is not None), None)
    if first is None:
        if any(owner is not None for owner in owners):
            raise PrivacyError(
                f"Expected {func.__name__} of {named([node])} to have rows, got one sample without any. "
                "Give each record a row, or filter the dataset before fit."
            )
        return None
    return CallLayout(tuple(axes), (first,))  # type: ignore[arg-type]
