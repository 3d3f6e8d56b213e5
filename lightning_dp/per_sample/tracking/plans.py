"""The layouts of operations on private parameters, inferred from runs at two batch sizes.

An operation whose tensors all keep their shapes sees constants (positions, masks). Its result is a function of
parameters, which further runs follow, until a run finds nothing new. An operation on parameters alone whose result has
a batch axis (``expand``) repeats the parameters for every sample. All other operations are uses. The uses of one kind
of operation on one parameter are matched between runs by their order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import dense_parts_of, in_backward, is_dual, is_mapped, unreported
from lightning_dp.per_sample.layout import (
    HIDDEN,
    PENALTY,
    WAY_OUT,
    BatchAxis,
    CallLayout,
    Observation,
    Unclear,
    solve,
    solve_axis,
    tensors_of,
)
from lightning_dp.per_sample.tracking.arguments import replaced, tensors_in, with_other_values
from lightning_dp.per_sample.tracking.functions import derive
from lightning_dp.per_sample.tracking.learned import UNORDERED, Key, Learned, Plan
from lightning_dp.per_sample.tracking.nodes import named

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker

_MOST_PASSES = 12


class Observer:
    """A recorder of every operation of one run; earlier runs determine which results are followed.

    Args:
        known: plans found by earlier runs.
        without_grad: whether operations without gradient are recorded, too (reentrant checkpoints).
    """

    def __init__(self, known: Learned, *, without_grad: bool = False) -> None:
        self.known, self.without_grad = known, without_grad
        self.recomputes = False
        self._met, self._skipped = set[str](), set[str]()
        self.seen: dict[Key, list[Observation]] = {}
        self.labels: dict[Key, str] = {}

    def observe(self, tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation and record its tensors."""
        tensors = tensors_in(args, kwargs)
        nodes = [tracker.node_of(tensor) for tensor in tensors]
        known = [(node, tensor) for node, tensor in zip(nodes, tensors, strict=True) if node is not None]
        tracker.padding.note(func, args, kwargs, (node for node, _ in known))
        if not known or in_backward():
            self.recomputes |= bool(known)
            return func(*args, **kwargs)
        self._met |= {name for node, _ in known for name in node.names}
        if is_dual() or any(map(is_mapped, tensors)):
            raise PrivacyError(
                f"Expected {func.__name__} of {named(node for node, _ in known)} to see the samples of the batch, got "
                f"{HIDDEN}. Call the layer on the batch, outside of the transform; {WAY_OUT}."
            )
        if any(tensor.is_nested and tensor.layout == torch.strided for tensor in tensors):
            raise PrivacyError(
                f"Expected {func.__name__} of {named(node for node, _ in known)} to see tensors with a shape, got a "
                f"nested tensor of the older layout. Make it with layout=torch.jagged, or pad it; {WAY_OUT}."
            )
        plain = [tensor for node, tensor in zip(nodes, tensors, strict=True) if node is None]
        keys = list(dict.fromkeys((func.__name__, node.lineage) for node, _ in known))
        with_grad = torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor in known)
        call = Observation(
            inputs=[tensor.detach() for tensor in tensors] if plain else [],
            input_shapes=[tensor.shape for tensor in tensors] if plain else [],
            output_shapes=[],
            with_grad=with_grad,
            meets_others=bool(plain),
            meets_gradient=any(tensor.requires_grad for tensor in plain),
            like=None if tracker.rows_like is None else tracker.rows_like.detach(),
        )
        calls = self.seen.setdefault(keys[0], [])
        index = sum(other.with_grad for other in calls) if with_grad else len(calls)
        for key in keys:
            self.labels[key] = f"{func.__name__} of {', '.join(repr(node.name) for node, _ in known)}"
            self.seen.setdefault(key, []).append(call)
        plans = self.known.plans.get(keys[0], [])
        follows = keys[0] not in self.known.spread if not plain else index < len(plans) and plans[index] is None
        out = derive(tracker, func, args, kwargs) if follows else func(*args, **kwargs)
        outputs = tensors_of(out)
        call.output_shapes = [tensor.shape for tensor in outputs]
        if not plain:
            call.on_other_values = functools.partial(_on_other_values, func, args, kwargs)
        return out

    def skip(self, tracker: Tracker, args: Any, kwargs: Any) -> None:
        """Take note of the parameters of an operation without gradient."""
        nodes = map(tracker.known_node, tensors_in(args, kwargs))
        self._skipped |= {name for node in nodes if node is not None for name in node.names}

    @property
    def needs_more(self) -> bool:
        """True if operations without gradient matter, because a checkpoint runs them again in its backward."""
        return not self.without_grad and (self.recomputes or not self._skipped <= self._met)


class Learner:
    """A learner that runs the user's forward at two sizes until every operation is understood.

    Args:
        tracker: follows the parameters.
        run: executes the user's forward on that many samples.
        sizes: two different sizes.
    """

    def __init__(self, tracker: Tracker, run: Callable[[int], object], sizes: tuple[int, int]) -> None:
        self.tracker = tracker
        self.run = run
        self.sizes = sizes
        self._without_grad = False

    def learn(self, names: set[str]) -> Learned:
        """Return the plans of all operations, to be closed once the order of their rows was looked for.

        Args:
            names: qualified names of the parameters that are followed.

        Raises:
            PrivacyError: the samples cannot be distinguished in some operation.
        """
        known = Learned(names=names)
        for _ in range(_MOST_PASSES):
            observers = [self._observe(size, known) for size in self.sizes]
            if any(observer.needs_more for observer in observers):
                self._without_grad, known = True, Learned(names=names)
                continue
            found, pending = self._solved(observers)
            found.names = names
            if found.spread == known.spread and _followed(found) == _followed(known):
                self._check(observers, found, pending)
                return found
            known = found
        raise PrivacyError(
            f"Expected to understand the uses of private parameters in {_MOST_PASSES} runs, got new ones in each. "
            f"{WAY_OUT}."
        )

    def _observe(self, size: int, known: Learned) -> Observer:
        observer = Observer(known, without_grad=self._without_grad)
        self.tracker.observer = observer
        self.tracker.start()
        try:
            self.run(size)
        finally:
            self.tracker.stop()
            self.tracker.observer = None
        for key, calls in observer.seen.items():
            # forwards without gradients count only if there are no others (reentrant checkpoints)
            observer.seen[key] = [call for call in calls if call.with_grad] or calls
        return observer

    def _solved(self, observers: list[Observer]) -> tuple[Learned, list[Key]]:
        """Return plans, and the operations that use tensors without a batch axis through which a gradient flows."""
        first, second = (dict(observer.seen) for observer in observers)
        learned, pending = Learned(), []
        for key in first.keys() & second.keys():
            if not any(call.meets_others for call in first[key]):
                plan = _spread_plan(first.pop(key)[0], second.pop(key)[0], self.sizes)
                if plan is not None:
                    learned.plans[key] = [plan]
                    learned.spread.add(key)
        for key, layouts in solve(first, second, self.sizes).items():
            if isinstance(layouts, Unclear):
                if key in first and key in second:
                    learned.plans[key] = [layouts]
                continue
            plans: list[Plan] = []
            for layout, call in zip(layouts, first[key], strict=True):
                axes = (*layout.inputs, *layout.outputs)
                unclear = [axis for axis in axes if isinstance(axis, Unclear)]
                if unclear:
                    plans.append(unclear[0])
                elif layout.unordered and not call.with_grad:
                    plans.append(Unclear(UNORDERED.format(layout.unordered[0].multiplicity)))
                elif any(isinstance(axis, BatchAxis) for axis in axes):
                    plans.append(layout)
                elif call.meets_gradient:
                    plans.append(Unclear("it has no batch axis"))
                    pending.append(key)
                else:
                    plans.append(None)
            learned.plans[key] = plans
        return learned, pending

    def _check(self, observers: list[Observer], found: Learned, pending: list[Key]) -> None:
        """Raise PrivacyError if a trained operation is not understood, or uses values that change with the batch."""
        first, second = (observer.seen for observer in observers)
        labels = found.labels = observers[0].labels | observers[1].labels
        for key, plans in found.plans.items():
            calls = first.get(key, second.get(key, []))
            for plan, call in zip(plans, calls, strict=False):
                if not isinstance(plan, Unclear) or not call.with_grad:
                    continue
                if key in pending:
                    raise PrivacyError(
                        f"Expected {labels[key]} to meet tensors with a batch axis, got one without a batch axis "
                        f"through which a gradient flows. {PENALTY}; a statistic of the batch mixes its samples; "
                        f"{WAY_OUT}."
                    )
                raise PrivacyError(
                    f"Expected to see which samples {labels[key]} works on, but {plan.reason}. {plan.way_out}"
                )
        changing = [
            (key, i, j)
            for key, plans in found.plans.items()
            for i, (plan, a, b) in enumerate(zip(plans, first.get(key, []), second.get(key, []), strict=False))
            if plan is None and a.with_grad and a.meets_others
            for j, (one, other) in enumerate(zip(a.inputs, b.inputs, strict=True))
            if not _same(one, other)
        ]
        if not changing:
            return
        again = self._observe(self.sizes[0], found).seen
        for key, i, j in changing:
            calls = again.get(key, [])
            if i < len(calls) and _same(first[key][i].inputs[j], calls[i].inputs[j]):
                raise PrivacyError(
                    f"Expected {labels[key]} to meet constants or tensors with a batch axis, got one without a batch "
                    "axis whose values change with the batch: its samples are mixed. Give it the batch axis; "
                    f"{WAY_OUT}."
                )


def _spread_plan(first: Observation, second: Observation, sizes: tuple[int, int]) -> Plan:
    """Return the layout of a result that repeats a function of parameters per sample; None if its shape is constant."""
    if first.output_shapes == second.output_shapes:
        return None
    if len(first.output_shapes) != 1 or len(second.output_shapes) != 1:
        return Unclear("the number of its results changes with the batch size")
    axis = solve_axis(first.output_shapes[0], second.output_shapes[0], sizes)
    if not isinstance(axis, BatchAxis):
        return axis
    assert second.on_other_values is not None
    (whole,) = (tensor.movedim(axis.axis, 0) for tensor in second.on_other_values())
    for order in (True, False):
        rows = torch.unflatten(whole, 0, (sizes[1], -1) if order else (-1, sizes[1]))
        rows = rows if order else rows.transpose(0, 1)
        if all(torch.equal(rows[0], other) for other in rows[1:]):
            return CallLayout((), (BatchAxis(axis.axis, axis.multiplicity, order),))
    return Unclear("its result is not the same for every sample")


def _on_other_values(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    with torch.no_grad(), unreported():
        args, kwargs = replaced(args, kwargs, with_other_values)
        return tensors_of(func(*args, **kwargs))


def _followed(learned: Learned) -> set[tuple[Key, int]]:
    return {(key, i) for key, plans in learned.plans.items() for i, plan in enumerate(plans) if plan is None}


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout is not torch.strided:
        return all(map(_same, dense_parts_of(one), dense_parts_of(other)))
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return bool(torch.equal(one, other)) or bool(((one == other) | ((one != one) & (other != other))).all())
