"""Functions of private parameters: their construction, and the pull-back of per-sample gradients through them.

A function of parameters is an ordinary result of autograd, connected to a stand-in of each parameter. The pull-back is
a vector-Jacobian product of that graph, mapped over the samples. If the function is a view of its parameter, its
entries are entries of the parameter, and no pull-back is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import in_custom_forward, in_transform, is_view, unreported
from lightning_dp.per_sample.arguments import exchanged, tensors_in
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.nodes import Function, Node, Reporting, region_of
from lightning_dp.per_sample.operations import IN_PLACE, SAME_ENTRIES
from lightning_dp.per_sample.rules.base import widen

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracker import Tracker

MOST_AT_ONCE = 2**24
"""Numbers that a pull-back holds at once."""

_LONG = 200
"""Characters up to which a name says which functions of parameters it was computed from."""


def derive(
    tracker: Tracker, func: Any, args: Any, kwargs: Any, tracked: Sequence[tuple[Tensor, Node]] | None = None
) -> Any:
    """Run an operation on parameters and constants; return its result as a function of parameters.

    Args:
        tracker: follows the parameters.
        func: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
        tracked: tensors of the arguments that have a node, with it; None to look for them.
    """
    if tracked is None:
        tracked = [(one, node) for one in tensors_in(args, kwargs) if (node := tracker.node_of(one)) is not None]
    for _, node in tracked:
        if node.generation < 0:  # functions have their graphs
            own = {id(one): _stand_in(tracker, node, one) for one, node in tracked if node.generation < 0}
            args, kwargs = exchanged(args, kwargs, own)
            break
    return _wrapped(tracker, func, func(*args, **kwargs), args, tracked)


def _stand_in(tracker: Tracker, node: Node, parameter: Tensor) -> Tensor:
    """Return the leaf to which functions of a parameter connect; a gradient that reaches it counts as untracked."""
    name = node.name
    if name not in tracker.stand_ins:
        if tracker.observer is not None:
            return parameter

        def take(leaf: Tensor) -> None:
            leaf.grad = None
            if tracker.recorder.active and tracker.recorder.listening:
                tracker.untracked.add(name)

        if in_transform():  # torch makes no leaf there
            raise PrivacyError(
                f"Expected functions of {name!r} alone outside of torch.func, got one within torch.vmap or another "
                f"transform. Compute it before the transform; {WAY_OUT}."
            )
        leaf = parameter.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        tracker.stand_ins[name] = leaf
    return tracker.stand_ins[name]


def connected(tracker: Tracker, node: Node, thing: Function) -> Node | None:
    """Return the node of a function of parameters, connected to the graph of its tensor; None while it has no graph.

    A result of ``within_custom`` gets its graph from its ``torch.autograd.Function``; as a leaf it has none. A tensor
    that was changed in place through a view has another graph, and so gets another node.
    """
    grad_fn = thing.grad_fn
    if grad_fn is None:
        return None if isinstance(node.value, Tensor) else node
    if grad_fn is thing.began:
        return node
    if isinstance(node.value, Tensor):
        tracker.has_custom = True
        node.value = _beginning(thing)
    else:
        node = Node(node.name, node.names, node.lineage, thing, None, _beginning(thing), node.generation)
    thing.node, thing.began = node, grad_fn
    return node


def _beginning(made: Tensor) -> Tensor | tuple[Any, int]:
    """Return where the graph of a tensor begins, which later operations in place leave alone."""
    grad_fn = made.grad_fn
    return made.detach() if grad_fn is None else (grad_fn, made.output_nr)


def within_custom(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Return the result of an operation without gradient; within the ``forward`` of a ``torch.autograd.Function``, on
    parameters alone, as a tracked tensor, which is a function of them once that class has given it a gradient.
    """
    tensors = tensors_in(args, kwargs)
    if type(out) is not Tensor or not out.is_floating_point() or not all(isinstance(one, Reporting) for one in tensors):
        return out
    nodes = [node for one in tensors if (node := tracker.known_node(one)) is not None]
    if len(nodes) < len(tensors) or not in_custom_forward():
        return out
    names = tuple(dict.fromkeys(name for node in nodes for name in node.names))
    lineage = tracker.number((func.__name__, "custom", *(node.lineage for node in nodes)))
    made: Any = out
    made.__class__ = tracker.function_class
    label = f"{func.__name__}({', '.join(node.name for node in nodes)})"
    made.node = Node(label, names, lineage, out, None, out.detach(), tracker.recorder.generation)
    made.began = None
    return made


def _wrapped(tracker: Tracker, func: Any, out: Any, args: Any, tracked: Sequence[tuple[Tensor, Node]]) -> Any:
    """Return the result of an operation on nodes as a function of parameters, or unchanged if no gradient flows."""
    key = (func.__name__, *[node.lineage for _, node in tracked])
    if args and (out is None or out is args[0]):
        target: Any = args[0]
        if IN_PLACE.fullmatch(func.__name__):
            if isinstance(target, Tensor) and target.requires_grad:
                _track(tracker, func, target, target, (*key, "in place"), tracked)
            return out
        if isinstance(out, Function):
            return out
    if isinstance(out, (tuple, list)):
        parts = [_wrap_one(tracker, func, one, (*key, "part", i), tracked) for i, one in enumerate(out)]
        return type(out)(*parts) if hasattr(type(out), "_fields") else type(out)(parts)
    return _wrap_one(tracker, func, out, key, tracked)


def _wrap_one(tracker: Tracker, func: Any, out: Any, key: Hashable, tracked: Sequence[tuple[Tensor, Node]]) -> Any:
    if type(out) is Tensor and out.grad_fn is not None:  # an alias would be one more operation to pull back through
        return _track(tracker, func, out, out, key, tracked)
    if not isinstance(out, Tensor) or not (out.is_floating_point() or out.is_complex()):
        return out
    if not (out.requires_grad or tracker.observer is not None) or isinstance(out, Reporting):
        return out
    for tensor, node in tracked:
        if node.value is None and out is tracker.stand_ins.get(node.names[0]):
            return tensor
    return _track(tracker, func, out.as_subclass(tracker.function_class), out, key, tracked)


def _track(
    tracker: Tracker, func: Any, made: Any, out: Tensor, key: Hashable, tracked: Sequence[tuple[Tensor, Node]]
) -> Any:
    """Make a tensor a function of parameters, whose graph begins at ``out``, the result of an operation."""
    made.__class__ = tracker.function_class
    made.began = made.grad_fn
    made.node = _node(tracker, func, out, key, tracked)
    return made


def _node(tracker: Tracker, func: Any, out: Tensor, key: Hashable, tracked: Sequence[tuple[Tensor, Node]]) -> Node:
    known = tracker.labels.get(key)
    if known is None:
        inner = ", ".join([node.name for _, node in tracked])
        label = f"{func.__name__}({inner if len(inner) < _LONG else '...'})"
        names = tuple(dict.fromkeys(name for _, node in tracked for name in node.names))
        known = tracker.labels[key] = tracker.number(key), label, names
    lineage, name, names = known
    region, generation, node = None, tracker.recorder.generation, tracked[0][1]
    if node.key is not node and len(tracked) == 1:
        parameter = tracker.parameters[names[0]]
        if func.__name__ in SAME_ENTRIES:
            whole = out.shape == node.shape and out.device == parameter.device
            if whole and out.is_complex() == parameter.is_complex():
                if node.region is None:
                    return Node(node.name, names, lineage, out, None, None, generation)
                region = node.region
        if region is None and is_view(out):
            region = region_of(out, parameter)
        if region is not None and region == (0, parameter.shape, parameter.stride()):
            return Node(node.name, names, lineage, out, None, None, generation)
    return Node(name, names, lineage, out, region, _beginning(out), generation)


def pulled_back(tracker: Tracker, grads: Iterable[tuple[Node, Tensor]], names: Collection[str]) -> dict[str, Tensor]:
    """Return per-sample gradients ``(B, *shape)`` of parameters: the sum over functions of them.

    Args:
        tracker: holds the stand-ins of the parameters.
        grads: functions with their per-sample gradients, ``(B, *shape)``; read while few are held at once.
        names: parameters whose gradients are asked for; those that no function reaches are left out.
    """
    total: dict[str, Tensor] = {}
    for group in _groups(tracker, grads):
        reached = [name for name in dict.fromkeys(name for node in group for name in node.names) if name in names]
        kinds: list[Mapping[str, Tensor]] = [tracker.stand_ins]
        if tracker.has_custom:  # a torch.autograd.Function takes the parameters themselves
            kinds.append(tracker.parameters)
        for kind in kinds:
            roots = {name: kind[name] for name in reached if name in kind}
            if roots:
                total = _added([total, _pulled_together(group, roots)])
    return total


def _groups(tracker: Tracker, grads: Iterable[tuple[Node, Tensor]]) -> Iterator[dict[Node, Tensor]]:
    """Yield functions whose gradients are pulled back in one pass, few enough for a bounded memory; functions of
    parameters of lower precision one by one, because a pass adds up in their type.
    """
    group: dict[Node, Tensor] = {}
    held = 0
    for node, grad in grads:
        dtypes = {node.dtype, *(tracker.parameters[name].dtype for name in node.names)}
        narrow = any(dtype.itemsize < 4 for dtype in dtypes)
        if group and (narrow or held + grad.numel() > MOST_AT_ONCE):
            yield group
            group, held = {}, 0
        group[node] = grad
        held += grad.numel()
        if narrow:
            yield group
            group, held = {}, 0
    if group:
        yield group


def _pulled_together(group: Mapping[Node, Tensor], roots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of the gradients that some functions pass back to parameters."""
    size = len(next(iter(group.values())))
    if size == 0:
        empty = next(iter(group.values()))
        return {name: empty.new_zeros(0, *root.shape) for name, root in roots.items()}
    numbers = [node for node, grad in group.items() if node.numel == 1 and grad.dtype.itemsize >= 4]
    if len(numbers) == 1:  # such as a penalty: its gradient is the same for all samples, up to a factor
        rest = {node: grad for node, grad in group.items() if node is not numbers[0]}
        parts = [_pulled_together(rest, roots)] if rest else []
        return _added([*parts, _of_number(numbers[0], group[numbers[0]], roots)])
    cotangents = [grad.to(node.dtype) for node, grad in group.items()]
    largest = max(*(node.numel for node in group), *(root.numel() for root in roots.values()), 1)
    step = max(1, MOST_AT_ONCE // largest)
    pieces: list[Sequence[Tensor | None]] = []
    for part in zip(*(torch.split(cotangent, step) for cotangent in cotangents), strict=True):
        try:
            pieces.append(_vjp(group, roots, part, batched=True))
        except Exception:  # an operation whose backward cannot be mapped
            if len(group) > 1:
                return _added([_pulled_together({node: grad}, roots) for node, grad in group.items()])
            singles = [_vjp(group, roots, one) for one in zip(*part, strict=True)]
            pieces.append([None if s[0] is None else torch.stack(s) for s in zip(*singles, strict=True)])
    return {
        name: widen(found[0] if len(found) == 1 else torch.cat(found))
        for name, found in zip(roots, zip(*pieces, strict=True), strict=True)
        if found[0] is not None
    }


def _of_number(node: Node, grad: Tensor, roots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients that a function with a single entry passes back: outer products with one gradient."""
    factors = grad.to(node.dtype).flatten()
    found = zip(roots.items(), _vjp([node], roots, [torch.ones_like(grad[0], dtype=node.dtype)]), strict=True)
    return {
        name: widen(torch.outer(factors.to(one.dtype), one.flatten()).view(-1, *root.shape))
        for (name, root), one in found
        if one is not None
    }


def _vjp(
    nodes: Iterable[Node], roots: Mapping[str, Tensor], given: Sequence[Tensor], *, batched: bool = False
) -> Sequence[Tensor | None]:
    values: Any = [GradientEdge(*node.value) for node in nodes]  # type: ignore[misc]
    with warnings.catch_warnings(), unreported():
        warnings.simplefilter("ignore")  # notes on operations that are mapped slowly
        return torch.autograd.grad(
            values, [*roots.values()], given, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )


def _added(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, grad in part.items():
            total[name] = total[name] + grad if name in total else grad
    return total
