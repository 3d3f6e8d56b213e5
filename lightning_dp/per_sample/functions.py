"""Functions of private parameters: their construction, and the pull-back of per-sample gradients through them.

A function of parameters is an ordinary result of autograd, connected to a stand-in of each parameter. The pull-back is
a vector-Jacobian product of that graph, mapped over the samples. If the function is a view of its parameter, its
entries are entries of the parameter, and no pull-back is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.per_sample.arguments import replaced
from lightning_dp.per_sample.nodes import Function, Node, Reporting, region_of
from lightning_dp.per_sample.operations import IN_PLACE, SAME_ENTRIES
from lightning_dp.per_sample.rules.base import widen

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracker import Tracker


def derive(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on parameters and constants; return its result as a function of parameters."""
    nodes: list[tuple[Node, Tensor]] = []

    def attached(tensor: Tensor) -> Tensor:
        node = tracker.node_of(tensor)
        if node is None:
            return tensor
        nodes.append((node, tensor))
        return tensor if isinstance(tensor, Function) else tracker.stand_in(node, tensor)

    args, kwargs = replaced(args, kwargs, attached)
    out = func(*args, **kwargs)
    return _wrapped(tracker, func, out, args, nodes)


def _wrapped(tracker: Tracker, func: Any, out: Any, args: Any, nodes: list[tuple[Node, Tensor]]) -> Any:
    """Return the result of an operation on nodes as a function of parameters, or unchanged if no gradient flows."""
    key = (func.__name__, tuple(node.lineage for node, _ in nodes))
    if args and (out is None or out is args[0]) and IN_PLACE.fullmatch(func.__name__):
        target: Any = args[0]
        if isinstance(target, Tensor) and target.requires_grad:
            value = target.view_as(target)
            target.__class__ = tracker.function_class
            args[0].node = _made(tracker, func, value, (*key, "in place"), nodes)
        return out
    if args and out is args[0] and isinstance(out, Function):
        return out
    if isinstance(out, (tuple, list)):
        parts = [_wrap_one(tracker, func, one, (*key, i), nodes) for i, one in enumerate(out)]
        return type(out)(*parts) if hasattr(type(out), "_fields") else type(out)(parts)
    return _wrap_one(tracker, func, out, key, nodes)


def _wrap_one(tracker: Tracker, func: Any, out: Any, key: Hashable, nodes: list[tuple[Node, Tensor]]) -> Any:
    if not isinstance(out, Tensor) or not (out.is_floating_point() or out.is_complex()):
        return out
    if not (out.requires_grad or tracker.observer is not None) or isinstance(out, Reporting):
        return out
    for node, tensor in nodes:
        if node.value is None and out is tracker.stand_ins.get(node.names[0]):
            return tensor
    made = out.as_subclass(tracker.function_class)
    made.node = _made(tracker, func, out, key, nodes)
    return made


def _made(tracker: Tracker, func: Any, out: Tensor, key: Hashable, nodes: list[tuple[Node, Tensor]]) -> Node:
    names = tuple(dict.fromkeys(name for node, _ in nodes for name in node.names))
    lineage = tracker.number(key)
    region = None
    if len(nodes) == 1 and nodes[0][0].is_view:
        (node, _), parameter = nodes[0], tracker.parameters[names[0]]
        whole = out.shape == node.shape and out.device == parameter.device
        if func.__name__ in SAME_ENTRIES and whole:
            if node.region is None:
                return Node(node.name, names, lineage, out, generation=tracker.recorder.generation)
            region = node.region
        else:
            region = region_of(out, parameter)
        if region is not None and region == (0, parameter.shape, parameter.stride()):
            return Node(node.name, names, lineage, out, generation=tracker.recorder.generation)
    name = f"{func.__name__}({', '.join(node.name for node, _ in nodes)})"
    return Node(name, names, lineage, out, region=region, value=out, generation=tracker.recorder.generation)


def pulled_back(tracker: Tracker, node: Node, grads: Tensor) -> dict[str, Tensor]:
    """Return per-sample gradients ``(B, *shape)`` of a node's parameters, given the per-sample gradients of
    the node.
    """
    assert node.value is not None
    names = [name for name in node.names if name in tracker.stand_ins]
    roots = [tracker.stand_ins[name] for name in names]
    value, cotangents = node.value, grads.to(node.value.dtype)

    def found(cotangent: Tensor, batched: bool) -> Sequence[Tensor | None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on operations that are mapped slowly
            return torch.autograd.grad(
                value, roots, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

    if grads.shape[0] == 0:
        return {name: grads.new_zeros(0, *root.shape) for name, root in zip(names, roots, strict=True)}
    step = max(1, 2**24 // max(1, node.numel, *(root.numel() for root in roots)))
    parts: list[Sequence[Tensor | None]] = []
    for part in torch.split(cotangents, step):
        try:
            parts.append(found(part, True))
        except Exception:  # an operation whose backward cannot be mapped
            singles = [found(one, False) for one in part]
            parts.append([None if s[0] is None else torch.stack(s) for s in zip(*singles, strict=True)])
    whole = {}
    for name, pieces in zip(names, zip(*parts, strict=True), strict=True):
        if pieces[0] is not None:
            whole[name] = widen(torch.cat(pieces))
    return whole
