"""Uses of parameters in steps that differentiate a gradient, as gradient penalties and forces of molecules do.

    y = A(x) + b,   A linear in x and in the weight;   a backward that creates a graph computes   u = A*(g)

The weight is used again in ``u``. For a gradient ``h`` of ``u``,

    d<h, A*(g)> / d weight  =  d<A(h), g> / d weight,

so the weight gets what it gets from an input ``h`` with the backprop ``g``. Backwards through ``u`` use ``A`` again, so
that derivatives of any order are recorded. References: the adjoint of an operation that is linear in both arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.per_sample._torch import in_backward, in_transform, unfollowed
from lightning_dp.per_sample.tracking.arguments import replaced
from lightning_dp.per_sample.tracking.uses import Use, tap_output

if TYPE_CHECKING:
    from lightning_dp.per_sample.layout import BatchAxis
    from lightning_dp.per_sample.owners.owned import OwnedAxis
    from lightning_dp.per_sample.rules.base import Rule
    from lightning_dp.per_sample.sources import Source
    from lightning_dp.per_sample.tracking.nodes import Node
    from lightning_dp.per_sample.tracking.operations import Bound
    from lightning_dp.per_sample.tracking.tracker import Tracker


class Linear(NamedTuple):
    """An operation that is linear in its input, or its adjoint.

    Args:
        source: receives what the weight gets.
        axes: of the samples in input and output of the operation.
        keys: of the tensors that get something; a bias gets nothing from derivatives of higher order.
        use: of the operation itself; None for what a backward computes.
        is_adjoint: whether it is ``A*``.
        run: computes its result by ordinary tensors.
    """

    source: Source
    axes: tuple[BatchAxis | OwnedAxis, BatchAxis | OwnedAxis]
    keys: frozenset[Hashable]
    use: Use | None
    is_adjoint: bool
    run: Callable[[Tensor], Tensor]

    def receive(self, given: Tensor, backprop: Tensor) -> None:
        """Record what the weight gets, unless the backward is one of ``torch.autograd.grad``."""
        recorder = self.source.recorder
        if torch.is_grad_enabled() and recorder.listening and not recorder.counts_backward():
            return
        use = self.use
        if use is None:
            activation, backprop = (backprop, given) if self.is_adjoint else (given, backprop)
            use = Use(self.source, (activation,), *self.axes, keys=self.keys)
        use.receive(backprop)


class _Apply(torch.autograd.Function):
    """A linear operation whose backward is one, too."""

    @staticmethod
    @override
    def forward(ctx: Any, given: Tensor, source: Tensor, linear: Linear) -> Tensor:
        with torch.enable_grad():
            ctx.given = given.detach().requires_grad_()
            ctx.result = linear.run(ctx.given)
        ctx.linear = linear
        result: Tensor = ctx.result.detach()
        return result

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Any) -> Any:
        (backprop,), linear, given, result = grads, ctx.linear, ctx.given, ctx.result
        with unfollowed():
            linear.receive(given.detach(), backprop)

            def adjoint(of: Tensor) -> Tensor:
                found: tuple[Tensor] = torch.autograd.grad(result, given, of, create_graph=True)
                return found[0]

            if torch.is_grad_enabled():
                keys = linear.keys - {linear.source.key_of.get("bias")}
                reverse = Linear(linear.source, linear.axes, keys, None, not linear.is_adjoint, adjoint)
                return _apply(backprop, reverse) if ctx.needs_input_grad[0] else None, None, None
            if not ctx.needs_input_grad[0]:
                return None, None, None
            return *torch.autograd.grad(result, given, backprop, retain_graph=True), None, None


def _apply(given: Tensor, linear: Linear) -> Tensor:
    source = linear.source.recorder.tap_source(given.device)  # the result requires grad whether or not ``given`` does
    result: Tensor = _Apply.apply(given, source, linear)  # type: ignore[no-untyped-call]
    return result


def allows(tracker: Tracker, rule: Rule, given: Any) -> bool:
    """Tell whether a rule records all of a use: if gradients are differentiated, only of operations linear in
    ``given``.
    """
    return rule.is_linear or not (tracker.differentiates_twice and given.requires_grad)


def recorded(
    tracker: Tracker, func: Any, args: Any, kwargs: Any, bound: Bound, nodes: Mapping[str, Node], use: Use
) -> Tensor:
    """Run an operation that has a rule, and record its use of tracked tensors.

    Args:
        tracker: of the tensors.
        func: the operation.
        args: its arguments.
        kwargs: its arguments by name.
        bound: the arguments as the rule reads them.
        nodes: of the tracked tensors, by local name.
        use: receives the backprop.
    """
    (given, weight, bias), _, call = bound
    own = [t.detach() if name in nodes else t for name, t in (("weight", weight), ("bias", bias))]
    if not in_backward():
        use.source.calls += 1
    if tracker.differentiates_twice and given.requires_grad and not in_transform():
        assert use.in_axis is not None
        held = {id(weight): own[0], id(bias): own[1]}

        def run(input: Tensor) -> Tensor:
            new = replaced(args, kwargs, lambda t: input if t is given else held.get(id(t), t))
            result: Tensor = func(*new[0], **new[1])
            return result

        linear = Linear(use.source, (use.in_axis, use.out_axis), use.keys, use, is_adjoint=False, run=run)
        out = _apply(given, linear)
    else:
        out = tap_output(call(func, *own), use)
    tracker.recorder.count(use.inputs[0])
    tracker.recorder.count(out)
    return out
