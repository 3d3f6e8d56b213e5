"""Learn how a model calls its modules: layouts, and where a tensor without batch axis may be expanded to the batch.

The user's forward is run at two batch sizes. Bare parameters of shape ``(1, ...)`` and inputs without batch axis
(positions) are then expanded on trial, at both sizes. A trial passes if every call keeps its shapes and what follows
shows, by its gradients, that a sample depends on its own row of the expanded tensor and on no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.per_sample.layout import (
    BatchAxis,
    CallLayout,
    Observation,
    Observations,
    Unclear,
    solve,
    tensors_of,
)
from lightning_dp.per_sample.recorder import Slot, in_backward
from lightning_dp.per_sample.rule_unit import expand_input

Layouts = dict[str, list[CallLayout] | Unclear]
Key = tuple[str, int]
"""(parameter path, -1) or (module name, call index)."""


@dataclass
class Learned:
    """What is known after :func:`learn`.

    Args:
        layouts: module name to the layouts of its calls, with the accepted expansions in force.
        parents: module name to the names of the modules during whose calls it was called; None for no module.
        parameters: paths of the bare parameters that are expanded.
        inputs: (module name, call index) of the calls whose input is expanded.
        tried: paths of the private parameters that it was learned for.
    """

    layouts: Layouts
    parents: dict[str, set[str | None]]
    parameters: set[str] = field(default_factory=set)
    inputs: set[Key] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)


@dataclass
class _Trial:
    """Expansions on trial in one run."""

    size: int
    baseline: Layouts
    slots: dict[str, list[tuple[str, Slot]]]
    inputs: set[Key]
    leaves: dict[Key, list[Tensor]] = field(default_factory=dict)
    confirmed: set[Key] = field(default_factory=set)
    refuted: set[Key] = field(default_factory=set)

    def probe(self, tensors: Iterable[Tensor], axes: Iterable[Any]) -> None:
        """Test every open expansion against tensors whose batch axis is known."""
        for key, leaves in self.leaves.items():
            if key in self.confirmed or key in self.refuted:
                continue
            for tensor, axis in zip(tensors, axes, strict=False):
                if isinstance(axis, BatchAxis) and tensor.requires_grad:
                    self._probe_one(key, leaves, tensor, axis)

    def _probe_one(self, key: Key, leaves: list[Tensor], tensor: Tensor, axis: BatchAxis) -> None:
        rows = tensor.shape[axis.axis] // self.size
        for sample in (0, self.size - 1):
            cotangent = torch.zeros_like(tensor)
            along = cotangent.movedim(axis.axis, 0)
            if axis.sample_major or rows == 1:
                mine = along[sample * rows : (sample + 1) * rows]
            else:
                mine = along[sample :: self.size]
            mine.copy_(torch.linspace(1.0, 2.0, mine.numel(), device=mine.device).view(mine.shape))
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                tensor, leaves, cotangent, retain_graph=True, allow_unused=True
            )
            for grad in grads:
                if grad is None:
                    continue
                touched = (grad != 0).flatten(1).any(1)
                if bool(touched.any()):
                    touched[sample] = False
                    (self.refuted if bool(touched.any()) else self.confirmed).add(key)


class _Watch:
    """Hooks on every module that note the shapes of its calls and apply the expansions of a trial."""

    def __init__(self, modules: dict[str, nn.Module], trial: _Trial | None) -> None:
        self.seen: Observations = {}
        self.trial = trial
        self._stack: list[tuple[str, int, list[Slot]] | None] = []
        self._modules = modules

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for name, module in self._modules.items():
            handles.append(module.register_forward_pre_hook(self._before(name), prepend=True, with_kwargs=True))
            handles.append(
                module.register_forward_hook(self._after(name), prepend=True, with_kwargs=True, always_call=True)
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for frame in reversed(self._stack):
                for slot in frame[2] if frame is not None else ():
                    slot.restore()

    def _before(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if in_backward():
                self._stack.append(None)
                return None
            calls = self.seen.setdefault(name, [])
            index = len(calls)
            parent = next(((frame[0], frame[1]) for frame in reversed(self._stack) if frame is not None), None)
            parameters = list(module.parameters())
            trains = not parameters or any(parameter.requires_grad for parameter in parameters)
            calls.append(Observation([], [], [], torch.is_grad_enabled() and trains, parent))
            replaced: list[Slot] = []
            self._stack.append((name, index, replaced))
            if self.trial is None or not torch.is_grad_enabled():
                return None
            for path, slot in self.trial.slots.get(name, ()):
                leaf = slot.parameter.detach().expand(self.trial.size, *slot.parameter.shape[1:]).requires_grad_()
                if slot.replace(leaf):
                    replaced.append(slot)
                    self.trial.leaves.setdefault((path, -1), []).append(leaf)
            if (name, _with_grad(calls)) in self.trial.inputs:
                return expand_input(args, kwargs, self.trial.size)
            return None

        return hook

    def _after(self, name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            frame = self._stack.pop() if self._stack else None
            if frame is None:
                return
            for slot in frame[2]:
                slot.restore()
            if output is None:
                return
            inputs, outputs = tensors_of((args, kwargs)), tensors_of(output)
            calls = self.seen[name]
            call = calls[frame[1]]
            call.inputs = [tensor.detach() for tensor in inputs]
            call.input_shapes = [tensor.shape for tensor in inputs]
            call.output_shapes = [tensor.shape for tensor in outputs]
            trial = self.trial
            if trial is None or not torch.is_grad_enabled():
                return
            index = sum(other.with_grad for other in calls[: frame[1]])
            layouts = trial.baseline.get(name)
            if isinstance(layouts, list) and index < len(layouts):
                trial.probe(inputs, layouts[index].inputs)
                trial.probe(outputs, layouts[index].outputs)
            if (name, index) in trial.inputs:
                trial.leaves.setdefault((name, index), []).extend(t for t in outputs if t.requires_grad)

        return hook


def _with_grad(calls: list[Observation]) -> int:
    """Return the index of the latest call among those with grad mode on."""
    return sum(call.with_grad for call in calls[:-1])


class Learner:
    """Run the user's forward at two sizes, with or without expansions.

    Args:
        module: the user's module.
        run: executes the user's forward on that many samples.
        sizes: two different sizes.
    """

    def __init__(self, module: nn.Module, run: Callable[[int], None], sizes: tuple[int, int]) -> None:
        # scripted modules take no such hooks
        self.modules = {n: m for n, m in module.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
        self.run = run
        self.sizes = sizes

    def _layouts(self, trials: tuple[_Trial | None, _Trial | None]) -> tuple[Layouts, dict[str, set[str | None]]]:
        seen: list[Observations] = []
        parents: dict[str, set[str | None]] = {}
        for size, trial in zip(self.sizes, trials, strict=True):
            watch = _Watch(self.modules, trial)
            with watch.watching():
                self.run(size)
            for name, calls in watch.seen.items():
                graded = [call for call in calls if call.with_grad]
                watch.seen[name] = graded or calls
                for call in watch.seen[name]:
                    parents.setdefault(name, set()).add(call.parent[0] if call.parent else None)
            seen.append(watch.seen)
        return solve(seen[0], seen[1], self.sizes), parents

    def learn(self, bare: dict[str, tuple[str, Slot]], layers: Iterable[str]) -> Learned:
        """Learn layouts and expansions.

        Args:
            bare: path to (owner's name, slot) of private parameters with a leading axis of 1 and no rule.
            layers: names of modules with a rule that own private parameters.
        """
        learned = Learned(*self._layouts((None, None)))
        keys = {(path, -1) for path, (owner, _) in bare.items() if learned.layouts.get(owner)}
        learned = self._extend(learned, keys, bare)
        keys = {
            (name, index)
            for name in layers
            for index, call in enumerate(_calls(learned.layouts, name))
            if call.inputs[:1] == (None,) and call.outputs[:1] == (None,)
        }
        return self._extend(learned, keys, bare)

    def _extend(self, known: Learned, keys: set[Key], bare: dict[str, tuple[str, Slot]]) -> Learned:
        """Try further expansions on top of the accepted ones: together, then each alone, then those that passed."""
        if not keys:
            return known
        passed, learned = self._try(known, keys, bare)
        if learned is not None and passed == keys:
            return learned
        if learned is None and len(keys) > 1:
            passed = {key for key in sorted(keys) if self._try(known, {key}, bare)[0]}
        if passed and passed != keys:
            again, learned = self._try(known, passed, bare)
            if learned is not None and again == passed:
                return learned
        return known

    def _try(
        self, known: Learned, keys: set[Key], bare: dict[str, tuple[str, Slot]]
    ) -> tuple[set[Key], Learned | None]:
        parameters = known.parameters | {path for path, index in keys if index < 0}
        inputs = known.inputs | {key for key in keys if key[1] >= 0}
        slots: dict[str, list[tuple[str, Slot]]] = {}
        for path in parameters:
            owner, slot = bare[path]
            slots.setdefault(owner, []).append((path, slot))
        trials = tuple(_Trial(size, known.layouts, slots, inputs) for size in self.sizes)
        try:
            layouts, parents = self._layouts((trials[0], trials[1]))
        except Exception:  # an expansion may break the user's forward in any way; without it the forward ran
            return set(), None
        if not _same_shapes(known.layouts, layouts):
            return set(), None
        passed = {key for key in keys if all(key in t.confirmed and key not in t.refuted for t in trials)}
        return passed, Learned(layouts, parents, parameters, inputs)


def _calls(layouts: Layouts, name: str) -> list[CallLayout]:
    calls = layouts.get(name, [])
    return calls if isinstance(calls, list) else []


def _same_shapes(before: Layouts, after: Layouts) -> bool:
    """Tell whether every tensor that had a batch axis has it still, in every call."""
    for name, layouts in before.items():
        others = after.get(name)
        if isinstance(layouts, Unclear):
            continue
        if not isinstance(others, list) or len(others) != len(layouts):
            return False
        for call, other in zip(layouts, others, strict=True):
            axes = zip((*call.inputs, *call.outputs), (*other.inputs, *other.outputs), strict=False)
            if any(isinstance(a, BatchAxis) and a != b for a, b in axes):
                return False
    return True
