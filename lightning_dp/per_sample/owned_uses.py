"""Uses of parameters while the owners of rows are followed: ``Tracker.use`` and ``Tracker.general`` in that mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import leaves
from lightning_dp.per_sample._torch import in_backward
from lightning_dp.per_sample.arguments import replaced
from lightning_dp.per_sample.functions import derive
from lightning_dp.per_sample.layout import WAY_OUT, BatchAxis, CallLayout
from lightning_dp.per_sample.nodes import Node, named
from lightning_dp.per_sample.operations import ALIGNED, Bound
from lightning_dp.per_sample.owned import NOBODY, Mixed, OwnedAxis, Rows, merged
from lightning_dp.per_sample.rules.base import Rule
from lightning_dp.per_sample.uses import Use, tap, tap_output

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracker import Tracker


def use(
    tracker: Tracker, func: Any, args: Any, kwargs: Any, rule: Rule, bound: Bound, nodes: Mapping[str, Node]
) -> Any:
    """Run an operation that has a rule."""
    assert tracker.follower is not None
    (tensor, weight, bias), spec, call = bound
    rows = tracker.follower.owners_of(tensor)
    if rows is None:
        return derive(tracker, func, args, kwargs)
    if isinstance(rows, Mixed):
        return _refuse(func, nodes.values(), rows)
    axis = _axis_for(rule, spec, rows, tensor)
    if axis is None:
        return tracker.unbatched(func, nodes.values())
    compare(tracker, func, next(iter(nodes.values())), (tensor,), rows)
    out = call(func, weight.detach() if "weight" in nodes else weight, bias.detach() if "bias" in nodes else bias)
    source = tracker.source(rule, spec, func.__name__, nodes)
    if not in_backward():
        source.calls += 1
    made = Use(source, source.keys, (tensor,), axis, axis)
    tracker.recorder.count(made.inputs[0])
    tracker.recorder.count(out)
    return tap_output(out, made)


def compare(tracker: Tracker, func: Any, node: Node, tensors: Sequence[Tensor], rows: Rows) -> None:
    """Count uses whose rows belong to other samples than the inferred positions say."""
    if tracker.learned is None:
        return
    size = tracker.recorder.batch_size
    plan = tracker.learned.plan((func.__name__, node.lineage), tracker.next_index, tensors, size)
    axes = [axis for axis in plan.inputs if isinstance(axis, BatchAxis)] if isinstance(plan, CallLayout) else []
    if not axes or rows.axis is None or len(rows.index) % max(1, size):
        tracker.num_misplaced += 1
        return
    identity, per_sample = torch.arange(size, device=rows.index.device), len(rows.index) // max(1, size)
    by_sample = axes[0].sample_major is not False
    expected = identity.repeat_interleave(per_sample) if by_sample else identity.repeat(per_sample)
    tracker.num_misplaced += not torch.equal(rows.index, expected)


def _refuse(func: Any, nodes: Iterable[Node], rows: Mixed) -> NoReturn:
    raise PrivacyError(
        f"Expected {func.__name__} of {named(nodes)} to meet rows of known samples, got rows that come from {rows.by}. "
        f"{WAY_OUT}."
    )


def _axis_for(rule: Rule, spec: Any, rows: Rows, tensor: Tensor) -> OwnedAxis | BatchAxis | None:
    """Return the axis of the rows for a rule; None if the rule cannot use it."""
    if rows.axis is not None and rule.follows(spec, rows.axis, tensor.dim()):
        if rows.is_identity:
            return BatchAxis(rows.axis)
        return None if bool((rows.index == NOBODY).any()) else OwnedAxis(rows.axis, rows.index)
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
    """Run an operation that has no rule."""
    follower = tracker.follower
    assert follower is not None
    mine = {id(tensor): node for tensor, node in tracked}
    found = [(tensor, follower.owners_of(tensor)) for tensor in tensors if id(tensor) not in mine]
    owned = [(tensor, rows) for tensor, rows in found if isinstance(rows, Rows)]
    for _, rows in found:
        if isinstance(rows, Mixed):
            return _refuse(func, mine.values(), rows)
    if not owned:
        return derive(tracker, func, args, kwargs)
    one = {rows.only for _, rows in owned}
    if len(one) == 1 and None not in one:  # the whole tensor belongs to one sample
        axis = OwnedAxis(None, owned[0][1].index[:1])
        own = {id(t): _copy(tracker, t, node, t.detach().view_as(t), axis) for t, node in tracked}
        return _run(func, args, kwargs, own)
    num_axes = max(tensor.dim() for tensor in tensors)
    rows = merged([(tensor.dim(), rows) for tensor, rows in owned], num_axes)
    if not isinstance(rows, Rows) or rows.axis is None:
        return tracker.unbatched(func, mine.values())
    if bool((rows.index == NOBODY).any()):
        return tracker.unbatched(func, mine.values())
    compare(tracker, func, next(iter(mine.values())), tensors, rows)
    if func.__name__ in ALIGNED:
        copies = _aligned(tracker, tracked, rows, num_axes, [tensor for tensor, _ in owned])
        if copies is not None:
            return _run(func, args, kwargs, copies)
    repeated = _repeated(tracker, tracked, rows)
    if len(repeated) == len(tracked):
        return _run(func, args, kwargs, repeated)
    return _over_samples(tracker, func, args, kwargs, tensors, tracked, found)


def _copy(tracker: Tracker, tensor: Tensor, node: Node, value: Tensor, axis: OwnedAxis | BatchAxis) -> Tensor:
    """Return one copy of a tensor per row; the copies' gradient goes to its source."""
    source = tracker.source(leaves.LEAF, node.shape, "copies", {"copy": node})
    if not in_backward():
        source.calls += 1
    return tap(value, Use(source, source.keys, (), None, axis))


def _run(func: Any, args: Any, kwargs: Any, own: Mapping[int, Tensor]) -> Any:
    args, kwargs = replaced(args, kwargs, lambda tensor: own.get(id(tensor), tensor))
    return func(*args, **kwargs)


def _axis(rows: Rows) -> OwnedAxis | BatchAxis:
    assert rows.axis is not None
    return BatchAxis(rows.axis) if rows.is_identity else OwnedAxis(rows.axis, rows.index)


def _aligned(
    tracker: Tracker, tracked: list[tuple[Tensor, Node]], rows: Rows, num_axes: int, data: list[Tensor]
) -> dict[int, Tensor] | None:
    """Return copies that broadcast along the rows; None if a parameter varies along them."""
    assert rows.axis is not None
    wide = next((tensor for tensor in data if tensor.dim() and tensor.is_floating_point()), None)
    repeated, copies = _repeated(tracker, tracked, rows), {}
    for tensor, node in tracked:
        if id(tensor) in repeated:
            copies[id(tensor)] = repeated[id(tensor)]
            continue
        padded = (1,) * (num_axes - tensor.dim()) + tuple(tensor.shape)
        if padded[rows.axis] != 1:
            return None
        made = _copy(
            tracker, tensor, node, leaves.along(tensor.detach(), padded, rows.axis, len(rows.index)), _axis(rows)
        )
        if tensor.dim() == 0 and wide is not None:
            made = made.to(wide.dtype)
        copies[id(tensor)] = made
    return copies


def _repeated(tracker: Tracker, tracked: list[tuple[Tensor, Node]], rows: Rows) -> dict[int, Tensor]:
    """Return copies of parameters that the user expands along the rows, as in ``token.expand(B, -1, -1)``."""
    copies: dict[int, Tensor] = {}
    axis, num = rows.axis, len(rows.index)
    assert axis is not None
    for tensor, _ in tracked:
        if tensor.dim() > axis and tensor.shape[axis] == num and num > 1 and tensor.stride(axis) == 0:
            one = derive(tracker, torch.narrow, (tensor, axis, 0, 1), {})
            node = tracker.node_of(one)
            assert node is not None
            copies[id(tensor)] = _copy(
                tracker, one, node, leaves.along(one.detach(), one.shape, axis, num), _axis(rows)
            )
    return copies


def _over_samples(
    tracker: Tracker,
    func: Any,
    args: Any,
    kwargs: Any,
    tensors: Sequence[Tensor],
    tracked: list[tuple[Tensor, Node]],
    found: Sequence[tuple[Tensor, Any]],
) -> Any:
    """Map an operation over samples with one row each; refuse it if their number of rows differs."""
    follower = tracker.follower
    assert follower is not None
    values = {id(tensor): tensor.detach() for tensor, _ in tracked}
    for value in values.values():
        follower.note(value, None)
    result = follower.result(func, *replaced(args, kwargs, lambda tensor: values.get(id(tensor), tensor)))
    of = {id(tensor): rows for tensor, rows in found}
    if not isinstance(result, Rows) or not result.is_identity:
        return tracker.unbatched(func, [node for _, node in tracked])
    axes: list[BatchAxis | None] = []
    for tensor in tensors:
        rows = of.get(id(tensor))
        if rows is not None and not rows.is_identity:
            return tracker.unbatched(func, [node for _, node in tracked])
        axes.append(None if rows is None else BatchAxis(rows.axis))
    assert result.axis is not None
    plan = CallLayout(tuple(axes), (BatchAxis(result.axis),))
    return leaves.over_samples(tracker, func, args, kwargs, plan, tracked, tensors)


def plan_of(tracker: Tracker, func: Any, node: Node, tensors: Sequence[Tensor]) -> CallLayout | None:
    """Return the layout of a registered operation: rows first in its result, as in its first data tensor."""
    assert tracker.follower is not None
    owners = [tracker.follower.owners_of(tensor) for tensor in tensors]
    for owner in owners:
        if isinstance(owner, Mixed):
            _refuse(func, [node], owner)
    axes = [_axis(owner) if isinstance(owner, Rows) and owner.axis is not None else None for owner in owners]
    first = next((axis for axis in axes if axis is not None), None)
    if first is None:
        if any(owner is not None for owner in owners):
            raise PrivacyError(
                f"Expected {func.__name__} of {named([node])} to have rows, got one sample without any. "
                "Give each record a row, or filter the dataset before fit."
            )
        return None
    return CallLayout(tuple(axes), (first,))  # type: ignore[arg-type]
