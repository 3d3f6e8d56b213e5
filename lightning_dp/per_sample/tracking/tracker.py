"""The tracker that follows private parameters through the operations of a step.

An operation on parameters alone gives a function of parameters. An operation that meets tensors with a batch axis is a
use: it has a rule, or the parameter is expanded to a copy for each sample. The layouts learned at two batch sizes
decide between these cases (plans.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import UnrolledMaps, in_backward, uncompiled, unreported
from lightning_dp.per_sample.layout import WAY_OUT, BatchAxis, CallLayout
from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.rules.base import Rule
from lightning_dp.per_sample.sources import Source
from lightning_dp.per_sample.tracking import leaves, mapping, owned_uses, twice, unlearned
from lightning_dp.per_sample.tracking.arguments import tensors_in
from lightning_dp.per_sample.tracking.functions import connected, derive, in_real_numbers, within_custom
from lightning_dp.per_sample.tracking.learned import Key, Learned
from lightning_dp.per_sample.tracking.nodes import Function, Node, Reporting, is_tracked, named, reporting_class
from lightning_dp.per_sample.tracking.operations import ALIGNED, GENERAL, Bound, Operation, operation_of
from lightning_dp.per_sample.tracking.padding import PaddingRows
from lightning_dp.per_sample.tracking.plans import Observer
from lightning_dp.per_sample.tracking.recurrent import watch_order
from lightning_dp.per_sample.tracking.repeats import Repeats
from lightning_dp.per_sample.tracking.replaying import Replays
from lightning_dp.per_sample.tracking.sharing import Sharing
from lightning_dp.per_sample.tracking.sparse_made import DenseMatrices
from lightning_dp.per_sample.tracking.uses import Recorder, Use
from lightning_dp.per_sample.workspace import Workspace


class Tracker:
    """Private parameters as tracked tensors, and the uses that they report.

    Args:
        recorder: state of the microbatch.
        materialise: always compute full per-sample gradients.
        workspace: buffers for gradients; None to cache small ones only.
    """

    def __init__(self, recorder: Recorder, *, materialise: bool, workspace: Workspace | None) -> None:
        self.recorder = recorder
        self.sources: dict[Hashable, Source] = {}
        self.learned: Learned | None = None
        self.observer: Observer | None = None
        self.untracked: set[str] = set()
        self._materialise, self._workspace = materialise, workspace
        self.parameters: dict[str, nn.Parameter] = {}
        self._nodes: dict[int, Node] = {}
        self.stand_ins, self.repeats, self.padding = dict[str, Tensor](), Repeats(), PaddingRows()
        self.copies: dict[Hashable, Any] = {}
        """Copies of parameters for the samples, which all elementwise operations of a microbatch share."""
        self.blocks: dict[Hashable, set[int]] = {}  # blocks of parameters that were used one by one, see leaves.py
        self._sharing, self.replays = Sharing(), Replays()
        self._counts, self._lineages, self.complex_parameters = dict[Key, int](), dict[Hashable, int](), set[int]()
        self.labels: dict[Hashable, tuple[int, str, tuple[str, ...]]] = {}  # number, label, parameters of lineages
        self._classes: dict[type[Any], type[Any]] = {}
        self.function_class: type[Function] = reporting_class(Function, self)
        self._replaced: list[tuple[Tensor, type[Any]]] = []
        self._around, self.is_started = ExitStack(), False
        self.has_custom = False
        """Whether some functions of parameters are results of a ``torch.autograd.Function``."""
        self.follower: Follower | None = None
        self.compares = False
        """Whether owners of rows are compared with what their positions say."""
        self.contradicted: str | None = None
        """First use of which as many rows as were learned belong to other samples than their positions say."""
        self.tried: set[Hashable] = set()  # operations without a rule whose map over the samples was compared with them
        self.rows_like: Tensor | None = None  # whose rows have the order of those that the running operation is given
        self.num_misplaced = 0
        """Uses whose rows belong to other samples than their positions say, as far as both are known."""
        self.differentiates_twice = False
        """Whether uses in a backward that creates a graph are recorded, which costs time."""
        self.spreads_penalties = False  # over the samples; see ``GradientEngine.spread_penalties``
        self.joined: frozenset[int | tuple[int, ...]] = frozenset()  # see ``GradientEngine``
        self.chooses_rows = self.owns_by_position = False
        """Whether data chose the rows of a use, or rows that hold no data got owners by position, while comparing."""

    def begin_comparison(self) -> None:
        """Compare owners of rows with what their positions say, in the microbatches that follow."""
        self.compares, self.num_misplaced, self.contradicted = True, 0, None
        self.chooses_rows = self.owns_by_position = False

    def set_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set the parameters that are followed."""
        self.stop()
        self.parameters = dict(parameters)
        self._nodes = {id(p): Node(name, (name,), self.number(name), p) for name, p in parameters.items()}
        self.sources, self.complex_parameters = {}, {id(p) for p in parameters.values() if p.is_complex()}

    def start(self) -> None:
        """Make the parameters report every operation on them."""
        self._counts, self.untracked, self.has_custom = {}, set(), False
        watch_order(on=True)
        self.is_started = True
        for parameter in self.parameters.values():
            plain = type(parameter)
            if plain not in self._classes:
                self._classes[plain] = reporting_class(plain, self)
            self._replaced.append((parameter, plain))
            parameter.__class__ = self._classes[plain]
        silent: list[Any] = [uncompiled(), UnrolledMaps(is_tracked), DenseMatrices()]  # code that reports no operations
        for context in silent + [rule.installed() for rule in self.replays.rules]:
            self._around.enter_context(context)

    def follow(self, size: int, constants: list[Tensor]) -> None:
        """Follow the owners of rows through every operation, until :meth:`stop`."""
        self.follower = Follower(self, size, constants)
        self.follower.__enter__()

    def stop(self) -> None:
        """Turn the parameters back into ordinary ones and forget every use."""
        if self.follower is not None:
            self.follower.__exit__(None, None, None)
            self.follower = None
        if self.is_started:
            self.is_started = False
            watch_order(on=False)
        for parameter, plain in self._replaced:
            parameter.__class__ = plain
        self._replaced, self.stand_ins, self.copies = [], {}, {}
        self._sharing.clear()
        self._around.close()
        for source in self.sources.values():
            source.clear()
        self.sources = {key: source for key, source in self.sources.items() if source.is_lasting}

    def number(self, what: Hashable) -> int:
        """Return the number of a lineage; a new lineage gets the next free number."""
        return self._lineages.setdefault(what, len(self._lineages))

    def node_of(self, thing: Any) -> Node | None:
        """Return the node of a tracked tensor through which a gradient may flow; None for other objects."""
        if (kind := type(thing)) is Tensor or not (kind is self.function_class or isinstance(thing, Reporting)):
            return None
        node = thing.node if kind is self.function_class else self.known_node(thing)
        follows = self.observer is not None and self.observer.without_grad
        if node is None or not (thing.requires_grad or follows):
            return None
        may_be_another = node.generation >= 0 and (thing.grad_fn is None or thing.grad_fn is not thing.began)
        if may_be_another and not follows and (node := connected(self, node, thing)) is None:
            return None
        if node.generation not in (-1, self.recorder.generation):
            raise PrivacyError(
                f"Expected functions of parameters to be computed in each batch, got {node.name!r} of an earlier one. "
                "Compute it in training_step."
            )
        return node

    def known_node(self, thing: Any) -> Node | None:
        """Return the node of a tracked tensor, whether or not a gradient flows through it."""
        return thing.node if isinstance(thing, Function) else self._nodes.get(id(thing))

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on a tracked tensor, as its ``__torch_function__``."""
        kwargs = kwargs or {}
        operation, observer, with_grad = operation_of(func), self.observer, torch.is_grad_enabled()
        listens, follows = self.recorder.active or observer is not None, observer is not None and observer.without_grad
        if operation is None or not listens or not (with_grad or follows):
            with unreported():
                out = func(*args, **kwargs)
            if operation is None or not listens or with_grad:
                return out
            if observer is not None:
                observer.skip(self, args, kwargs)
            return within_custom(self, func, args, kwargs, out)
        args, kwargs = in_real_numbers(self, args, kwargs)
        if operation.is_composite:
            return operation.run(self, func, args, kwargs)
        return self.run_one(operation, func, args, kwargs)

    def run_one(self, operation: Operation, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation that is not composite."""
        with unreported():
            if self.spreads_penalties and leaves.is_penalty(self, func, args, kwargs):
                return leaves.spread_evenly(self, func, args, kwargs)
            if self.observer is not None:
                return self.observer.observe(self, func, args, kwargs)
            if self.compares or (self.learned is not None and func.__name__ in self.learned.by_order):
                self._count(func, args, kwargs)
            if operation is GENERAL:
                return unlearned.general(self, func, args, kwargs)
            return operation.run(self, func, args, kwargs)

    def _count(self, func: Any, args: Any, kwargs: Any) -> None:
        """Count an operation among those of its kind on each of its parameters, as the observer did."""
        if not in_backward():
            nodes = (self.node_of(tensor) for tensor in tensors_in(args, kwargs))
            for key in {(func.__name__, node.lineage) for node in nodes if node is not None}:
                self._counts[key] = self._counts.get(key, -1) + 1

    def primitive(self, func: Any, args: Any, kwargs: Any, operation: Operation = GENERAL) -> Any:
        """Run an operation that a composite one consists of; in the general way if it has no rule."""
        if self.follower is None:
            return self.run_one(operation, func, args, kwargs)
        return self.follower.run(func, args, kwargs, lambda: self.run_one(operation, func, args, kwargs))

    def use(self, func: Any, args: Any, kwargs: Any, rule: Rule, bound: Bound) -> Any:
        """Run an operation that has a rule."""
        (tensor, weight, bias), spec, _ = bound
        if self.node_of(tensor) is not None:
            return self.general(func, args, kwargs)
        found = {"weight": self.node_of(weight), "bias": self.node_of(bias)}
        nodes = {name: node for name, node in found.items() if node is not None}
        if nodes and isinstance(weight, Tensor) and (weight.is_complex() or not twice.allows(self, rule, tensor)):
            return self.general(func, args, kwargs)  # rules do not conjugate
        if not nodes:
            return func(*args, **kwargs)
        if self.follower is not None:
            return owned_uses.use(self, func, args, kwargs, rule, bound, nodes)
        plan = self.plan_of(func, next(iter(nodes.values())), (tensor,))
        if plan is None:
            return derive(self, func, args, kwargs)
        in_axis, out_axis = plan.inputs[0], plan.outputs[0]
        if not isinstance(in_axis, BatchAxis) or not isinstance(out_axis, BatchAxis):
            return self.unbatched(func, nodes.values())
        if not rule.follows(spec, in_axis.axis, tensor.dim()):
            return self.unbatched(func, nodes.values())
        use = Use(self.source(rule, spec, func.__name__, nodes), (tensor,), in_axis, out_axis)
        out = twice.recorded(self, func, args, kwargs, bound, nodes, use)
        size = self.recorder.batch_size
        rows = in_axis.rows_of_one(tensor, size, func.__name__)
        return out if rows == out_axis.rows_of_one(out, size, func.__name__) else self.unbatched(func, nodes.values())

    def source(self, rule: Rule, spec: Any, operation: str, nodes: Mapping[str, Node]) -> Source:
        """Return the source of all uses of these tensors in one operation."""
        key = (rule, spec, *nodes, *(node.key for node in nodes.values()))
        if key not in self.sources:
            self.sources[key] = Source(
                self.recorder, rule, spec, operation, nodes, materialise=self._materialise, workspace=self._workspace
            )
        return self.sources[key]

    def general(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation that has no rule: derive a function of parameters, or expand these to the samples."""
        tensors, tracked, others = tensors_in(args, kwargs), [], []
        for tensor in tensors:
            if type(tensor) is not Tensor and (node := self.node_of(tensor)) is not None:
                tracked.append((tensor, node))
            else:
                others.append(tensor)
        if not tracked:
            return func(*args, **kwargs)
        if self.follower is not None:
            return owned_uses.general(self, func, args, kwargs, tensors, tracked)
        assert self.learned is not None
        if not others:
            if (func.__name__, tracked[0][1].lineage) not in self.learned.spread:
                out = derive(self, func, args, kwargs, tracked, tensors)
                if type(out) is self.function_class and not kwargs:
                    self._sharing.share(func, args, out, tracked)
                return out
            return leaves.spread(self, func, args, kwargs, self.plan_of(func, tracked[0][1], tensors))
        plan = self.plan_of(func, tracked[0][1], tensors)
        if plan is None:
            if any(other.requires_grad for other in others):
                raise PrivacyError(
                    f"Expected {func.__name__} to meet {named(node for _, node in tracked)} as it did when its "
                    f"layout was learned, got a tensor that requires grad. {WAY_OUT}."
                )
            return derive(self, func, args, kwargs, tracked, tensors)
        if len(plan.inputs) != len(tensors):
            return self.unbatched(func, [node for _, node in tracked])
        if func.__name__ in ALIGNED:
            result = leaves.aligned(self, func, args, kwargs, plan, tracked, tensors)
            if result is not NotImplemented:
                return result
        return mapping.over_samples(self, func, args, kwargs, plan, tracked, tensors)

    def plan_of(self, func: Any, node: Node, tensors: Sequence[Tensor]) -> CallLayout | None:
        """Return the layout of an operation; None if it sees no samples."""
        if self.follower is not None:
            return owned_uses.plan_of(self, func, node, tensors)
        assert self.learned is not None
        key, size = (func.__name__, node.lineage), self.recorder.batch_size
        found = self.learned.plan(key, self.index_of, tensors, size, self.joined)
        if isinstance(found, str):
            raise unlearned.UnlearnedError(
                f"Expected {func.__name__} to meet {node.name!r} in a way that was learned, {found} {WAY_OUT}."
            )
        return found

    def index_of(self, key: Key) -> int | None:
        """Return how many operations of a kind came before the one that runs; None in a recomputation."""
        return None if in_backward() else self._counts.get(key)

    def unbatched(self, func: Any, nodes: Any) -> Any:
        """Raise PrivacyError for an operation that mixes samples."""
        raise PrivacyError(
            f"Expected {func.__name__} of {named(nodes)} to keep the samples apart, got one that mixes them: its batch "
            f"axis is one that it computes over, or is missing. Give the samples an axis of their own; {WAY_OUT}."
        )
