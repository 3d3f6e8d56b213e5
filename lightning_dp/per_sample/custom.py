"""Rules that users register for their own operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.per_sample.tracking import operations
from lightning_dp.per_sample.tracking.registered import Gradients, Registered, report_apply, run_registered
from lightning_dp.per_sample.tracking.tracker import Tracker

_RULES: dict[Any, Registered] = {}
"""The rules that are registered now, by operation."""


def register_rule(
    operation: Any, gradients: Gradients, *, arguments: Sequence[str], parameters: Sequence[str]
) -> Callable[[], None]:
    """Register a function that computes the per-sample gradients of an operation.

    An operation without a rule is mapped over the samples if torch can map it. A ``torch.autograd.Function`` without a
    rule runs again for each sample, which a rule saves.

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
    rule = _RULES[operation] = Registered(operation.__name__, gradients, arguments, parameters)

    def run(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
        values = rule.named(args) | kwargs
        return run_registered(tracker, func, args, kwargs, rule, values, parameters)

    if isinstance(operation, type) and issubclass(operation, torch.autograd.Function):
        undo = report_apply(operation, run)
    else:
        built_in = operations.operation_of(operation)
        operations.add(operation, operations.Operation(run, keeps_rows=True))
        undo = functools.partial(operations.add, operation, built_in)

    def forget() -> None:
        _RULES.pop(operation, None)
        undo()

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
