"""Functions of private parameters: their construction.

A function of parameters is an ordinary result of autograd, connected to a stand-in of each parameter. If the function
is a view of its parameter, its entries are entries of the parameter; else its gradients are pulled back through that
graph (pulling.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import custom_call, in_transform, is_view, real_view, unreported
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.tracking.arguments import exchanged, tensors_in
from lightning_dp.per_sample.tracking.nodes import Function, Node, Reporting, named, region_of
from lightning_dp.per_sample.tracking.operations import ENTRYWISE, IN_PLACE, SAME_ENTRIES

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker

_CONSTANTS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
_LONG = 200
"""Characters up to which a name says which functions of parameters it was computed from."""


def derive(
    tracker: Tracker,
    func: Any,
    args: Any,
    kwargs: Any,
    tracked: Sequence[tuple[Tensor, Node]] | None = None,
    tensors: list[Tensor] | None = None,
) -> Any:
    """Run an operation on parameters and constants; return its result as a function of parameters.

    Args:
        tracker: follows the parameters.
        func: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
        tracked: tensors of the arguments that have a node, with it; None to look for them.
        tensors: all tensors of the arguments; None to look for them.
    """
    tensors = tensors_in(args, kwargs) if tensors is None else tensors
    if tracked is None:
        tracked = [(one, node) for one in tensors if (node := tracker.node_of(one)) is not None]
    own: dict[int, Tensor] = {}
    if len(tensors) > len(tracked):
        for one in tensors:
            if all(one is not other for other, _ in tracked):
                tracker.recorder.noted((func.__name__, tracked[0][1].lineage), one)
    for one, node in tracked:
        if node.generation < 0:  # functions have their graphs
            own[id(one)] = _stand_in(tracker, node, one)
    if own:
        args, kwargs = exchanged(args, kwargs, own)
    out = func(*args, **kwargs)
    key = (func.__name__, *[node.lineage for _, node in tracked])
    if type(out) is Tensor and (began := out.grad_fn) is not None and (not args or out is not args[0]):
        made: Any = out  # as _track() does
        made.__class__, made.began = tracker.function_class, began
        made.node = _node(tracker, func, out, (began, out.output_nr), key, tracked)
        return made
    return _wrapped(tracker, func, out, args, key, tracked)


def _stand_in(tracker: Tracker, node: Node, parameter: Tensor) -> Tensor:
    """Return the leaf to which functions of a parameter connect; a gradient that reaches it counts as untracked."""
    name = node.name
    if name not in tracker.stand_ins:
        if tracker.observer is not None:
            return real_view(parameter)

        def take(leaf: Tensor) -> None:
            leaf.grad = None
            if tracker.recorder.active and tracker.recorder.listening:
                tracker.untracked.add(name)

        if in_transform():  # torch makes no leaf there
            raise PrivacyError(
                f"Expected functions of {name!r} alone outside of torch.func, got one within torch.vmap or another "
                f"transform. Compute it before the transform; {WAY_OUT}."
            )
        leaf = real_view(parameter.detach()).requires_grad_()
        leaf.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        tracker.stand_ins[name] = leaf
    return tracker.stand_ins[name]


def in_real_numbers(tracker: Tracker, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments with each complex parameter as a function of real numbers: its real and imaginary parts."""
    if not tracker.complex_parameters:
        return args, kwargs
    found = [one for one in tensors_in(args, kwargs) if id(one) in tracker.complex_parameters and one.requires_grad]
    own = {id(one): _of_real(tracker, one) for one in found}
    return exchanged(args, kwargs, own) if own else (args, kwargs)


def _of_real(tracker: Tracker, parameter: Tensor) -> Tensor:
    """Return a complex parameter as a function of real numbers, the same one in the whole microbatch."""
    node = tracker.known_node(parameter)
    assert node is not None
    key = ("complex", node.name)
    if key not in tracker.copies:
        with torch.enable_grad(), unreported():
            made: Any = torch.view_as_complex(_stand_in(tracker, node, parameter))
        made.__class__, made.began, began = tracker.function_class, made.grad_fn, (made.grad_fn, made.output_nr)
        generation = tracker.recorder.generation
        made.node = Node(node.name, node.names, tracker.number(key), made, None, began, generation)
        tracker.copies[key] = made
    found: Tensor = tracker.copies[key]
    return found


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
    """Return the results of an operation without gradient; within the ``forward`` of a ``torch.autograd.Function`` of
    parameters and constants alone, as tracked tensors, which are functions of these parameters once that class has
    given them a gradient.
    """
    call = custom_call() if isinstance(out, (Tensor, tuple)) else None
    if call is None:
        return out
    own = [node for one in call[1] if (node := tracker.known_node(one)) is not None]
    names = tuple(dict.fromkeys(name for node in own for name in node.names))
    if not all(map(_is_constant, call[1])) or any(node.is_view and node.dtype.is_complex for node in own):
        tracker.replays.hidden.update(dict.fromkeys(names, call[0]))
        return out
    nodes = [node for one in tensors_in(args, kwargs) if (node := tracker.known_node(one)) is not None]
    label = f"{func.__name__}({', '.join(node.name for node in nodes)})"
    for at, one in enumerate(out if isinstance(out, tuple) else (out,)):
        if type(one) is Tensor and one.is_floating_point() and names:
            made: Any = one
            lineage = tracker.number((func.__name__, "custom", at, *(node.lineage for node in nodes)))
            made.__class__ = tracker.function_class
            made.node = Node(label, names, lineage, made, None, made.detach(), tracker.recorder.generation)
            made.began = None
    return out


def _is_constant(thing: Any) -> bool:
    """Tell whether an argument is a tracked tensor or a constant, and so holds no samples."""
    if isinstance(thing, Tensor):
        return isinstance(thing, Reporting) or (thing.dim() == 0 and not thing.requires_grad)
    return isinstance(thing, _CONSTANTS)


def _wrapped(
    tracker: Tracker, func: Any, out: Any, args: Any, key: tuple[Hashable, ...], tracked: Sequence[tuple[Tensor, Node]]
) -> Any:
    """Return the result of an operation on nodes as a function of parameters, or unchanged if no gradient flows."""
    if args and (out is None or out is args[0]):
        target: Any = args[0]
        if IN_PLACE.fullmatch(func.__name__):
            if isinstance(target, Tensor) and target.requires_grad:
                _track(tracker, func, target, target, (*key, "in place"), tracked)
            return out
        if isinstance(out, Function):
            return out
    if type(out) is not Tensor and isinstance(out, (tuple, list)):
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
    if out.layout != torch.strided:
        raise PrivacyError(
            f"Expected dense functions of private parameters, got {func.__name__} of "
            f"{named(node for _, node in tracked)}, which is sparse. Make it dense; {WAY_OUT}."
        )
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
    made.node = _node(tracker, func, out, _beginning(out), key, tracked)
    return made


def _node(
    tracker: Tracker, func: Any, out: Tensor, value: Any, key: Hashable, tracked: Sequence[tuple[Tensor, Node]]
) -> Node:
    """Return the node of a result, whose graph begins at ``value``."""
    known = tracker.labels.get(key)
    if known is None:
        inner = ", ".join([node.name for _, node in tracked])
        label = f"{func.__name__}({inner if len(inner) < _LONG else '...'})"
        names = tuple(dict.fromkeys(name for _, node in tracked for name in node.names))
        known = tracker.labels[key] = tracker.number(key), label, names
    lineage, name, names = known
    region, generation, node = None, tracker.recorder.generation, tracked[0][1]
    if node.is_view and len(tracked) == 1:
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
    made = Node(name, names, lineage, out, region, value, generation)
    if func.__name__ in ENTRYWISE:
        shape, dtype = made.shape, made.dtype
        for _, node in tracked:
            if not (node.is_entrywise and node.shape == shape and node.dtype == dtype):
                break
        else:
            made.is_entrywise = True
    return made
