"""Rules that users register for their own operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
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
from lightning_dp.system.torch_private import num_changes

Gradients = Callable[[Mapping[str, Any], Tensor], Mapping[str, Tensor]]
_RULES: dict[Any, _Registered] = {}
"""The rules that are registered now, by operation."""


def register_rule(
    operation: Any, gradients: Gradients, *, arguments: Sequence[str], parameters: Sequence[str]
) -> Callable[[], None]:
    """Register a function that computes the per-sample gradients of an operation.

    An operation without a rule is mapped over the samples if torch can map it. A ``torch.autograd.Function`` without a
    rule does not report its uses of private parameters.

    **Guarantee**: none about the rule itself. Test it by :func:`check_rule`. The comparison with single samples at the
    first batch of a run refuses a wrong rule, but only for the inputs of that batch. A sample's norm and its
    contribution are both taken from the sum of its rows of gradients, so they agree even if terms cancel.

    Args:
        operation: a function with one tensor as its result that torch dispatches (``torch.hypot``, say; not a Python
            function of yours), or a subclass of ``torch.autograd.Function`` whose ``forward`` takes positional
            arguments.
        gradients: called as ``gradients(values, backprop)`` without autograd. ``values`` holds the arguments by name:
            tensors with a batch axis have it first, with ``R`` rows. ``backprop`` is the gradient of the loss with
            respect to the result, ``(R, ...)``. It returns a dictionary of, for each parameter, one gradient for each
            row, ``(R, *parameter.shape)``. If a sample has several rows, their gradients are added up.
        arguments: names of the operation's positional arguments, in order.
        parameters: the arguments that may be private parameters.

    Returns:
        A function that removes the rule.

    Raises:
        TypeError: an operation or a rule that cannot be called.
        ValueError: names that are not those of the arguments.

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
        >>> check_rule(Scale, torch.ones(4, 3), torch.ones(3))
        >>> remove()
    """
    is_module = isinstance(operation, type) and issubclass(operation, nn.Module)
    if not callable(operation) or not callable(gradients) or is_module:
        raise TypeError(
            f"Expected a function, or a subclass of torch.autograd.Function, and a function of its gradients, got "
            f"operation={operation!r} and gradients={gradients!r}. Register the function that a module calls."
        )
    unknown = set(parameters) - set(arguments)
    if unknown or not parameters:
        raise ValueError(f"Expected parameters among arguments={tuple(arguments)}, got parameters={tuple(parameters)}.")
    rule = _RULES[operation] = _Registered(operation.__name__, gradients, arguments, parameters)

    def run(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
        values = rule.named(args) | kwargs
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
            _RULES.pop(operation, None)
            operations.add(reporting, None)
            if before is None:
                del operation.apply
            else:
                operation.apply = before  # type: ignore[method-assign]

        return remove
    built_in = operations.operation_of(operation)
    operations.add(operation, operations.Operation(run, keeps_rows=True))

    def forget() -> None:
        _RULES.pop(operation, None)
        operations.add(operation, built_in)

    return forget


def check_rule(operation: Any, *arguments: Any) -> None:
    """Compare a registered rule with the gradients of its operation on one row at a time, for tests of your own.

    Args:
        operation: a registered one.
        arguments: of the operation; a tensor belongs to the samples if it is no parameter and has as many rows, first,
            as the result.

    Raises:
        ValueError: the operation has no rule, or the rule returns other gradients than autograd.

    Example:
        >>> remove = register_rule(
        ...     torch.hypot,
        ...     lambda values, backprop: {"w": 2 * backprop * values["w"] / torch.hypot(values["x"], values["w"])},
        ...     arguments=("x", "w"),
        ...     parameters=("w",),
        ... )
        >>> check_rule(torch.hypot, torch.ones(4, 3), torch.ones(3))
        Traceback (most recent call last):
        ValueError: Expected the rule for hypot to return the gradient of each row, got for 'w' 2 times that of row 0.
        >>> remove()
    """
    if operation not in _RULES:
        raise ValueError(f"Expected an operation with a registered rule, got {operation!r}. Call register_rule first.")
    rule, apply = _RULES[operation], getattr(operation, "apply", operation)
    values = rule.named(arguments)
    leaves = {name: values[name].detach().requires_grad_() for name in rule.parameters}
    out = apply(*(values | leaves).values())
    rows, backprop = len(out), torch.randn_like(out)
    of_rows = [n for n, v in values.items() if n not in leaves and isinstance(v, Tensor) and v.shape[:1] == (rows,)]
    with torch.no_grad():
        found = rule.gradients(values, backprop, {name: leaf.shape for name, leaf in leaves.items()})
    for row in range(rows):
        given = values | leaves | {name: values[name][row : row + 1] for name in of_rows}
        grads = torch.autograd.grad(apply(*given.values()), list(leaves.values()), backprop[row : row + 1])
        for name, expected in zip(leaves, grads, strict=True):
            got, scale = found[name][row], float(expected.abs().max()) + 1e-30
            if not bool(((got - expected).abs() <= 1e3 * torch.finfo(expected.dtype).eps * scale).all()):
                factor = float((got * expected).sum() / expected.square().sum())
                off = (got - factor * expected).abs().max() > 1e-3 * scale
                raise ValueError(
                    f"Expected the rule for {rule.name} to return the gradient of each row, got for {name!r} "
                    f"{'another than' if off else f'{factor:.4g} times'} that of row {row}."
                )


def wrong_rules(message: str) -> list[str]:
    """Return the registered operations of parameters that an error message names."""
    return sorted(rule.name for rule in _RULES.values() if any(f" {name} (" in message for name in rule.met))


AXES = (BatchAxis, OwnedAxis)


class _Registered(Rule):
    is_stackable = False

    def __init__(self, name: str, gradients: Gradients, arguments: Sequence[str], parameters: Sequence[str]) -> None:
        self.name, self._gradients = name, gradients
        self._arguments, self.parameters = tuple(arguments), tuple(parameters)
        self.met: set[str] = set()
        """Qualified names of the parameters that it was used for."""

    def named(self, arguments: Sequence[Any]) -> dict[str, Any]:
        """Return positional arguments by name.

        Raises:
            ValueError: there are more of them than names.
        """
        if len(arguments) > len(self._arguments):
            raise ValueError(
                f"Expected register_rule to name all {len(arguments)} arguments of {self.name}, got "
                f"arguments={self._arguments}. Name them in order."
            )
        return dict(zip(self._arguments, arguments, strict=False))

    def gradients(
        self, values: Mapping[str, Any], backprop: Tensor, shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        """Return the gradients of each row for the parameters whose shapes are given.

        Raises:
            ValueError: the user's function raises, or returns something else.
        """
        given = [value for value in (*values.values(), backprop) if isinstance(value, Tensor)]
        before = [*map(num_changes, given)]
        try:
            found = self._gradients(values, backprop)
        except Exception as error:
            raise ValueError(
                f"The registered rule for {self.name} raised {type(error).__name__}: {error}. It was given "
                f"values={sorted(values)} and a backprop of shape {tuple(backprop.shape)}."
            ) from error
        if [*map(num_changes, given)] != before:
            raise ValueError(
                f"The registered rule for {self.name} changed its values or its backprop in place, from which other "
                "gradients are computed. Compute new tensors."
            )
        for name, shape in shapes.items():
            expected, got = (len(backprop), *shape), found.get(name) if isinstance(found, Mapping) else found
            if not isinstance(got, Tensor) or got.shape != expected:
                kind = "nothing" if got is None else type(got).__name__
                shown = tuple(got.shape) if isinstance(got, Tensor) else kind
                raise ValueError(
                    f"Expected a registered rule to return {name!r} of shape {expected}, got {shown}. The rule for "
                    f"{self.name} returns a dictionary with one gradient per row."
                )
        return dict(found)

    @override
    def per_sample(self, module: Any, calls: Sequence[Call], batch_size: int, names: set[str]) -> dict[str, Tensor]:
        if batch_size == 0:
            return {name: widen(calls[0].backprop).new_zeros(0, *module[name]) for name in names}
        grads: dict[str, Tensor] = {}
        for call in calls:
            found = self.gradients(call.kwargs, call.backprop, {name: module[name] for name in sorted(names)})
            for name in names:
                grad = sum_rows(widen(found[name]), call.multiplicity)
                grads[name] = grads[name] + grad if name in grads else grad
        return grads


class _Shapes(dict[str, torch.Size]):
    """A hashable dictionary of the shapes of parameters by name."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def _run(
    tracker: Tracker,
    func: Any,
    args: Any,
    kwargs: Any,
    rule: _Registered,
    values: dict[str, Any],
    parameters: Sequence[str],
) -> Any:
    nodes = {name: node for name in parameters if (node := tracker.node_of(values.get(name))) is not None}
    others = [value for name, value in values.items() if name not in nodes]
    if not nodes or any(isinstance(value, Reporting) and tracker.node_of(value) is not None for value in others):
        return tracker.general(func, args, kwargs)
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    plan = tracker.plan_of(func, next(iter(nodes.values())), tensors)
    if plan is None:
        return tracker.general(func, args, kwargs)
    rule.met |= {name for node in nodes.values() for name in node.names}
    out_axis = plan.outputs[0]
    if len(plan.outputs) != 1 or not isinstance(out_axis, AXES):
        raise PrivacyError(f"Expected a result with a batch axis of {func.__name__}, got none. {WAY_OUT}.")
    axes = dict(zip([name for name, value in values.items() if isinstance(value, Tensor)], plan.inputs, strict=True))
    plain = {name: value.detach() if name in nodes else value for name, value in values.items()}
    out = func(*(plain[name] for name in rule.named(args)), **{name: plain[name] for name in kwargs})
    shapes = _Shapes({name: node.shape for name, node in nodes.items()})
    source = tracker.source(rule, shapes, func.__name__, nodes)
    if not in_backward():
        source.calls += 1
    data = {name: values[name] for name, axis in axes.items() if isinstance(axis, AXES)}
    use = Use(source, data.values(), None, out_axis)
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
