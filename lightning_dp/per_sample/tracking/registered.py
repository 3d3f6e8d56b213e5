"""Rules that are made for single operations: the user's, and those of classes that are run again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import in_backward
from lightning_dp.per_sample.layout import WAY_OUT, BatchAxis
from lightning_dp.per_sample.owners.owned import OwnedAxis
from lightning_dp.per_sample.rules.base import Call, Rule, sum_rows, widen
from lightning_dp.per_sample.tracking import operations
from lightning_dp.per_sample.tracking.nodes import Node, Reporting
from lightning_dp.per_sample.tracking.uses import Use, tap_output
from lightning_dp.system.torch_private import num_changes

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker

Gradients = Callable[[Mapping[str, Any], Tensor], Mapping[str, Tensor]]
AXES = (BatchAxis, OwnedAxis)


class Registered(Rule):
    """The rule of an operation that a function of the user's gives."""

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

    def check(
        self, tracker: Tracker, nodes: Mapping[str, Node], values: Mapping[str, Any], axes: Mapping[str, Any], out: Any
    ) -> None:
        """Check that the rule holds for some arguments and a result; ``axes`` are those of samples, "" the result's.

        Raises:
            PrivacyError: it does not.
        """

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


class Shapes(dict[str, torch.Size]):
    """A hashable dictionary of the shapes of parameters by name.

    Args:
        shapes: of the parameters.
        axes: of the samples, by name of the argument, or "" for the result.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], axes: Mapping[str, int | None]) -> None:
        super().__init__(shapes)
        self.axes = dict(axes)

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shapes) and dict.__eq__(self, other) and self.axes == other.axes

    def __hash__(self) -> int:  # type: ignore[override]
        return hash((*self.items(), *self.axes.items()))


def run_registered(
    tracker: Tracker,
    func: Any,
    args: Any,
    kwargs: Any,
    rule: Registered,
    values: dict[str, Any],
    parameters: Sequence[str],
) -> Any:
    """Run an operation that has such a rule, with its arguments by name."""
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
    of_samples = {name: axis for name, axis in axes.items() if isinstance(axis, AXES)} | {"": out_axis}
    rule.check(tracker, nodes, plain, of_samples, out)
    shapes = {name: node.shape for name, node in nodes.items()}
    spec = Shapes(shapes, {name: axis.axis for name, axis in of_samples.items()})
    source = tracker.source(rule, spec, func.__name__, nodes)
    if not in_backward():
        source.calls += 1
    data = {name: values[name] for name in of_samples if name}
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


def report_apply(function: Any, run: Any) -> Callable[[], None]:
    """Let ``apply`` of a ``torch.autograd.Function`` report tracked arguments; return a function that undoes this.

    Args:
        function: the class.
        run: runs an application of it, given the tracker, the operation and its arguments.
    """
    before, apply = function.__dict__.get("apply"), function.apply

    @functools.wraps(function.forward)
    def reporting(*args: Any) -> Any:
        tensors = tuple(arg for arg in args if isinstance(arg, Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(reporting, tensors, *args)
        return apply(*args)

    def undo() -> None:
        operations.add(reporting, None)
        if before is None:
            del function.apply
        else:
            function.apply = before

    reporting.__name__ = function.__name__
    function.apply = staticmethod(reporting)
    operations.add(reporting, operations.Operation(run, keeps_rows=True))
    return undo
