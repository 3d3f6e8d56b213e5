"""Operations without a rule, mapped over the samples: each sample has its own copies of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp._messages import without_warnings
from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import WAY_OUT, BatchAxis, CallLayout, tensors_of
from lightning_dp.per_sample.tracking.arguments import replaced, with_other_values
from lightning_dp.per_sample.tracking.leaves import constant, copies_of
from lightning_dp.per_sample.tracking.nodes import Node, named

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


def over_samples(
    tracker: Tracker,
    func: Any,
    args: Any,
    kwargs: Any,
    plan: CallLayout,
    tracked: list[tuple[Tensor, Node]],
    tensors: Sequence[Tensor],
) -> Any:
    """Map an operation over the samples, each with its own copy of the parameters."""
    nodes, size = [node for _, node in tracked], tracker.recorder.batch_size
    if size == 0:
        return constant(tracker, func, args, kwargs)
    if not all(isinstance(axis, BatchAxis) for axis in plan.outputs) or not plan.outputs:
        return tracker.unbatched(func, nodes)
    own = {
        id(tensor): copies_of(tracker, tensor, node, lambda v: v.expand(size, *v.shape), BatchAxis(0))
        for tensor, node in tracked
    }
    key = (func.__name__, *(node.lineage for node in nodes))
    if key not in tracker.tried:
        if not _keeps_apart(func, args, kwargs, plan, {id(tensor) for tensor, _ in tracked}, tensors, size, nodes):
            return tracker.unbatched(func, nodes)
        tracker.tried.add(key)
    return over_rows(func, args, kwargs, plan, own, tensors, size, nodes)


def _keeps_apart(
    func: Any,
    args: Any,
    kwargs: Any,
    plan: CallLayout,
    tracked: set[int],
    tensors: Sequence[Tensor],
    size: int,
    nodes: Iterable[Node],
) -> bool:
    """Tell whether a map over the samples gives what the operation gives, on copies of its tensors.

    Zeros, as many layers begin with, hide a sum over samples, so tensors get other values if the operation allows.
    """

    def given(change: Callable[[Tensor], Tensor]) -> tuple[Any, Any, dict[int, Tensor]]:
        made = {id(tensor): change(tensor) for tensor in tensors}
        return *replaced(args, kwargs, lambda tensor: made[id(tensor)]), made

    def agree(change: Callable[[Tensor], Tensor]) -> bool:
        new_args, new_kwargs, made = given(change)
        own = {id(made[at]): made[at].expand(size, *made[at].shape) for at in tracked}
        rows = over_rows(func, new_args, new_kwargs, plan, own, [made[id(t)] for t in tensors], size, nodes)
        new_args, new_kwargs, _ = given(change)  # the operation may have written to its arguments
        return _alike(rows, func(*new_args, **new_kwargs))

    with torch.no_grad():
        try:
            return agree(with_other_values)
        except Exception:  # values that the operation refuses
            return agree(lambda tensor: tensor.detach().clone())


def _alike(one: Any, other: Any) -> bool:
    """Tell whether two results are equal to rounding, where they are finite."""
    for a, b in zip(tensors_of(one), tensors_of(other), strict=True):
        if a.shape != b.shape:
            return False
        if a.is_floating_point() and a.numel():
            most = torch.finfo(a.dtype).eps ** 0.5
            a, b = (tensor.detach().double().nan_to_num(0.0, 0.0, 0.0) for tensor in (a, b))
            if float((a - b).abs().max()) > most * float(b.abs().max()):
                return False
    return True


def over_rows(
    func: Any,
    args: Any,
    kwargs: Any,
    plan: CallLayout,
    own: Mapping[int, Tensor],
    tensors: Sequence[Tensor],
    size: int,
    nodes: Iterable[Node],
) -> Any:
    """Run an operation by a map over so many rows, each with copies of the parameters, by the identity of these."""

    def function(values: list[Tensor]) -> Any:
        given = iter(values)
        new_args, new_kwargs = replaced(args, kwargs, lambda _: next(given))
        return func(*new_args, **new_kwargs)

    try:
        return _mapped(
            function,
            [own.get(id(t), t) for t in tensors],
            [id(t) in own for t in tensors],
            plan,
            size,
            func.__name__,
        )
    except PrivacyError:
        raise
    except Exception as error:
        with torch.no_grad():
            func(*args, **kwargs)  # an error of the operation itself, such as a wrong index, is none of ours
        raise PrivacyError(
            f"Expected operations that can be computed for every sample by itself, got {func.__name__} of "
            f"{named(nodes)}, which cannot: {error!r}. {WAY_OUT}."
        ) from error


def _mapped(
    function: Callable[[list[Tensor]], Any],
    tensors: Sequence[Tensor],
    is_copy: Sequence[bool],
    layout: CallLayout,
    size: int,
    where: str,
) -> Any:
    """Return ``function(tensors)``, computed separately for every sample.

    Args:
        function: the operation.
        tensors: tensors of the operation, with the batch axes of the layout; copies, shape ``(B, *shape)``, for tracked
            tensors.
        is_copy: marks the copies.
        layout: of the operation.
        size: ``B``, at least 1.
        where: for messages.
    """
    inputs: list[Tensor] = []
    axes: list[BatchAxis | None] = []
    for tensor, copied, axis in zip(tensors, is_copy, layout.inputs, strict=True):
        axes.append(axis if isinstance(axis, BatchAxis) and not copied else None)
        if isinstance(axis, BatchAxis) and not copied:
            front, rows = axis.to_front(tensor, size, where)
            # by one axis: a view that kept odd strides of axes of length 1 makes backwards of convolutions fail
            tensor = front.reshape(-1).view(size, rows, *front.shape[1:])
        inputs.append(tensor)
    structures: list[Any] = []

    def of_one(values: list[Tensor]) -> list[Tensor]:
        rows = [
            value if axis is None else value.movedim(0, axis.axis) for value, axis in zip(values, axes, strict=True)
        ]
        found, structure = pytree.tree_flatten(function(rows))
        structures.append(structure)
        return [leaf.movedim(axis.axis, 0) for leaf, axis in zip(found, layout.outputs, strict=True)]  # type: ignore[union-attr]

    in_dims = [0 if copied or axis is not None else None for copied, axis in zip(is_copy, axes, strict=True)]
    with without_warnings():  # of operations that are mapped slowly
        outputs = torch.vmap(of_one, in_dims=(in_dims,))(inputs)
    # contiguous, as products are: a caller may call view() on the result
    whole = [axis.from_front(output).contiguous() for output, axis in zip(outputs, layout.outputs, strict=True)]  # type: ignore[union-attr]
    return pytree.tree_unflatten(whole, structures[0])
