"""Rules that users register for their own operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import operations
from lightning_dp.per_sample._torch import in_backward
from lightning_dp.per_sample.layout import WAY_OUT, BatchAxis
from lightning_dp.per_sample.nodes import Reporting
from lightning_dp.per_sample.owned import OwnedAxis
from lightning_dp.per_sample.rules.base import Call, Rule, sum_rows, widen
from lightning_dp.per_sample.tracker import Tracker
from lightning_dp.per_sample.uses import Use, tap_output

Gradients = Callable[[Mapping[str, Any], Tensor], Mapping[str, Tensor]]


def register_rule(
    operation: Any, gradients: Gradients, *, arguments: Sequence[str], parameters: Sequence[str]
) -> Callable[[], None]:
    """Register a function that computes the per-sample gradients of an operation.

    An operation without a rule is mapped over the samples if torch can map it. A ``torch.autograd.Function`` without a
    rule does not report its uses of private parameters.

    **Guarantee**: none about the rule itself. The comparison with single samples at the first batch of a run finds a
    wrong rule, but only for the inputs of that batch. A sample's norm and its contribution are both taken from the sum
    of its rows of gradients, so they agree even if terms cancel.

    Args:
        operation: a function with one tensor as its result that torch dispatches (``__torch_function__``), or a
            subclass of ``torch.autograd.Function`` whose ``forward`` takes positional arguments.
        gradients: called as ``gradients(values, backprop)`` without autograd. ``values`` holds the arguments by name:
            tensors with a batch axis have it first, with ``R`` rows. ``backprop`` is the gradient of the loss with
            respect to the result, ``(R, ...)``. It returns, for each parameter, one gradient for each row, ``(R,
            *parameter.shape)``.
        arguments: names of the operation's positional arguments, in order.
        parameters: the arguments that may be private parameters.

    Returns:
        A function that removes the rule.

    Example:
        >>> class Scale(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x, gain):
        ...         ctx.save_for_backward(x, gain)
        ...         return x * gain
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         x, gain = ctx.saved_tensors
        ...         return grad * gain, (grad * x).sum(0)
        >>> remove = register_rule(
        ...     Scale,
        ...     lambda values, backprop: {"gain": backprop * values["x"]},
        ...     arguments=("x", "gain"),
        ...     parameters=("gain",),
        ... )
        >>> remove()
    """
    unknown = set(parameters) - set(arguments)
    if unknown or not parameters:
        raise ValueError(f"Expected parameters among arguments={tuple(arguments)}, got parameters={tuple(parameters)}.")
    rule = _Registered(gradients)

    def run(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
        values = dict(zip(arguments, args, strict=False)) | kwargs
        return _run(tracker, func, args, kwargs, rule, values, parameters)

    if isinstance(operation, type) and issubclass(operation, torch.autograd.Function):
        before = operation.__dict__.get("apply")
        apply: Any = operation.apply

        @functools.wraps(operation.forward)
        def reporting(*args: Any) -> Any:
            tensors = tuple(arg for arg in args if isinstance(arg, Tensor))
            if has_torch_function(tensors):
                return handle_torch_function(reporting, tensors, *args)
            return apply(*args)

        reporting.__name__ = operation.__name__
        operation.apply = staticmethod(reporting)  # type: ignore[method-assign]
        operations.add(reporting, operations.Operation(run, keeps_rows=True))

        def remove() -> None:
            operations.add(reporting, None)
            if before is None:
                del operation.apply
            else:
                operation.apply = before  # type: ignore[method-assign]

        return remove
    operations.add(operation, operations.Operation(run, keeps_rows=True))
    return lambda: operations.add(operation, None)


AXES = (BatchAxis, OwnedAxis)


class _Registered(Rule):
    is_stackable = False

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients

    @override
    def per_sample(self, module: Any, calls: Sequence[Call], batch_size: int, names: set[str]) -> dict[str, Tensor]:
        if batch_size == 0:
            return {name: widen(calls[0].backprop).new_zeros(0, *module[name]) for name in names}
        grads: dict[str, Tensor] = {}
        for call in calls:
            found = self._gradients(call.kwargs, call.backprop)
            for name in names:
                rows = len(call.backprop)
                if name not in found or found[name].shape != (rows, *module[name]):
                    got = tuple(found[name].shape) if name in found else "nothing"
                    raise ValueError(
                        f"Expected a registered rule to return {name!r} of shape {(rows, *module[name])}, got {got}."
                    )
                grad = sum_rows(widen(found[name]), call.multiplicity)
                grads[name] = grads[name] + grad if name in grads else grad
        return grads


class _Shapes(dict[str, torch.Size]):
    """A hashable dictionary of the shapes of parameters by name."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def _run(
    tracker: Tracker, func: Any, args: Any, kwargs: Any, rule: Rule, values: dict[str, Any], parameters: Sequence[str]
) -> Any:
    nodes = {name: node for name in parameters if (node := tracker.node_of(values.get(name))) is not None}
    others = [value for name, value in values.items() if name not in nodes]
    if not nodes or any(isinstance(value, Reporting) and tracker.node_of(value) is not None for value in others):
        return tracker.general(func, args, kwargs)
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    plan = tracker.plan_of(func, next(iter(nodes.values())), tensors)
    if plan is None:
        return tracker.general(func, args, kwargs)
    out_axis = plan.outputs[0]
    if len(plan.outputs) != 1 or not isinstance(out_axis, AXES):
        raise PrivacyError(f"Expected a result with a batch axis of {func.__name__}, got none. {WAY_OUT}.")
    axes = dict(zip([name for name, value in values.items() if isinstance(value, Tensor)], plan.inputs, strict=True))
    plain = [values[name].detach() if name in nodes else value for name, value in values.items()]
    out = func(*plain)
    shapes = _Shapes({name: node.shape for name, node in nodes.items()})
    source = tracker.source(rule, shapes, func.__name__, nodes)
    if not in_backward():
        source.calls += 1
    data = {name: values[name] for name, axis in axes.items() if isinstance(axis, AXES)}
    use = Use(source, source.keys, data.values(), None, out_axis)
    held = dict(zip(data, use.inputs, strict=True))

    def in_rows(size: int, laid_out: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
        given = {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
        for name, tensor in held.items():
            axis = axes[name]
            assert isinstance(axis, AXES)
            given[name] = laid_out(*axis.to_front(tensor, size, func.__name__))
        return given

    use.arguments = in_rows
    return tap_output(out, use)
