"""The three ways to per-sample gradients: a rule for the layer, an expanded parameter, a recomputation (fallback.py).

Every unit answers the same three questions for its parameters, by qualified name: the gradients, their squared norms,
their weighted sum. ``B`` samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import WAY_OUT, CallLayout, Unclear, tensors_of
from lightning_dp.per_sample.recorder import Frame, Record, Recorder, Slot, Unit, main_input, tap, tap_layer
from lightning_dp.per_sample.rules.base import (
    Call,
    Rule,
    accumulation_dtype,
    masked_squared_norm,
    squared_norm,
    widen,
)
from lightning_dp.per_sample.workspace import Workspace

Grads = dict[str, Tensor]
Layouts = list[CallLayout] | Unclear


class Source(Unit):
    """A unit that turns its records into per-sample gradients.

    Args:
        recorder: shared state.
        module: the hooked module.
        name: its qualified name.
        slots: its private parameters.
        layouts: the learned layout of each of its calls.
        keep: whether per-sample gradients, once made, are kept until the microbatch ends.
    """

    def __init__(
        self,
        recorder: Recorder,
        module: nn.Module,
        name: str,
        slots: list[Slot],
        layouts: Layouts,
        *,
        keep: bool = True,
    ) -> None:
        super().__init__(recorder, module, name, slots)
        self.layouts = layouts
        self.keep = keep
        self._kept: Grads = {}
        self._kept_at = -1
        self._common: CallLayout | None = None
        if not isinstance(layouts, Unclear) and layouts and all(layouts[0].agrees(other) for other in layouts[1:]):
            # folded calls agree only with folded calls: any of them reads all
            self._common = layouts[0]

    @override
    def clear(self) -> None:
        super().clear()
        self._kept = {}

    def recorded(self) -> Iterator[Tensor]:
        """Yield the inputs and backprops that are in memory."""
        for record in self.records:
            yield from record.inputs
            yield from (grad for grads, _ in record.parts for grad in grads if grad is not None)

    def live(self) -> set[str]:
        """Return the parameters for which a backprop came."""
        found: set[str] = set()
        for record in self.records:
            for _, names in record.parts:
                found |= names
            if len(found) == len(self.names):
                break
        return found

    def layout_of(self, record: Record, outputs: Sequence[Tensor | None]) -> CallLayout:
        """Return the layout of a recorded call; ``PrivacyError`` if it was not learned."""
        layouts = self.layouts
        if isinstance(layouts, Unclear):
            raise PrivacyError(
                f"Expected a readable batch axis in module {self.name!r}, but {layouts.reason}. {WAY_OUT}."
            )
        if self._common is not None:
            return self._common
        index, size = record.index, self.recorder.batch_size
        if index is not None and index < len(layouts) and layouts[index].fits(record.inputs, outputs, size):
            return layouts[index]
        fitting = [layout for layout in layouts if layout.fits(record.inputs, outputs, size)]
        if fitting and all(fitting[0].agrees(other) for other in fitting):
            return fitting[0]
        if not layouts:
            raise PrivacyError(
                f"Expected module {self.name!r} to be called in the batch its layout was learned from, got its first "
                f"call later. Let the first batch use every layer (no layer dropped, no branch skipped); {WAY_OUT}."
            )
        raise PrivacyError(
            f"Expected every call of module {self.name!r} to be like one of the {len(layouts)} calls seen when its "
            f"layout was learned, got input shapes {[tuple(t.shape) for t in record.inputs]}. {WAY_OUT}."
        )

    def memory(self) -> Grads:
        """Return the gradients that were made since the last backprop came, to read and to add to."""
        if self._kept_at != self.recorder.changes:
            self._kept, self._kept_at = {}, self.recorder.changes
        return self._kept

    def kept(self, names: set[str]) -> Grads:
        """Return the gradients, from memory where they were made before and are allowed to stay."""
        self.memory()
        missing = names - self._kept.keys()
        made = self.per_sample(missing) if missing else {}
        grads = {**{name: self._kept[name] for name in names - missing}, **made}
        if self.keep:
            self._kept.update(made)
        return grads

    @abstractmethod
    def per_sample(self, names: set[str]) -> Grads:
        """Return gradients of shape ``(B, *shape)`` for those of the names that are live."""

    def squared_norms(self, names: set[str], masks: Mapping[str, Tensor]) -> Grads:
        """Return squared norms ``(B,)`` of the (masked) gradients."""
        grads = self.kept(names)
        return {name: norm_of(grad, masks.get(name)) for name, grad in grads.items()}

    def add_weighted_sum(self, out: Mapping[str, Tensor], factors: Tensor, dead: Tensor | None) -> None:
        """Add ``sum_i factors[i] gradient_i`` to ``out[name]``.

        Args:
            out: what is added to, for every parameter that is asked for and live.
            factors: shape ``(B,)``.
            dead: marks the samples of factor 0; None if there are none.
        """
        for name, grad in self.kept(set(out)).items():
            add_combined(out[name], grad, factors, dead)


def norm_of(grads: Tensor, mask: Tensor | None) -> Tensor:
    """Return the squared norm of every sample's gradient, or of what its mask keeps of it: shape ``(B,)``."""
    return squared_norm(grads) if mask is None else masked_squared_norm(grads, mask)


def add_combined(out: Tensor, grads: Tensor, factors: Tensor, dead: Tensor | None) -> None:
    """Add ``sum_i factors[i] grads[i]`` to ``out``; in place, as one matrix-vector product, where types allow."""
    whole = dead is None and out.dtype == grads.dtype and out.is_contiguous() and grads.is_contiguous()
    if whole and out.numel() and grads.shape[0]:
        out.view(-1).addmv_(grads.view(grads.shape[0], -1).mT, factors.to(grads.dtype))
    else:
        out.add_(combine(grads, factors, dead))


def combine(grads: Tensor, factors: Tensor, dead: Tensor | None) -> Tensor:
    """Return ``sum_i factors[i] grads[i]`` with the dead samples left out, whatever they hold."""
    if dead is not None:
        grads = grads.masked_fill(dead.reshape(-1, *[1] * (grads.dim() - 1)), 0.0)
    total: Tensor = torch.tensordot(factors.to(grads.dtype), grads, dims=1)
    return total


class RuleUnit(Source):
    """A layer with a rule.

    Args:
        rule: the rule of the layer.
        expanded: calls whose input carries no batch axis and is expanded to the batch.
        materialise: always make the full per-sample gradients.
        workspace: where gradients are kept from the norms to the weighted sum; None to keep small ones only.
    """

    def __init__(
        self,
        *args: Any,
        rule: Rule,
        expanded: frozenset[int] = frozenset(),
        materialise: bool = False,
        workspace: Workspace | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rule = rule
        self.workspace = workspace
        self.parameters = {slot.name: slot.parameter for slot in self.slots}
        self.expanded = expanded
        self.materialise = materialise
        self.local = {slot.name: slot.local for slot in self.slots}
        self._groups: list[tuple[set[str], list[Call]]] = []
        self._groups_at = -1
        rule.check(self.module, self.name)

    @override
    def clear(self) -> None:
        super().clear()
        self._groups, self._groups_at = [], -1

    @override
    def before(self, frame: Frame, args: Any, kwargs: Any) -> Any:
        index = frame.index
        if not self.expanded or (index not in self.expanded and index is not None):
            return None
        if index is None and len(self.expanded) != len(self.layouts if isinstance(self.layouts, list) else ()):
            raise PrivacyError(
                f"Expected a batch axis in the input of module {self.name!r} under activation checkpointing, got none. "
                f"{WAY_OUT}."
            )
        return expand_input(args, kwargs, self.recorder.batch_size)

    @override
    def observe(self, frame: Frame, args: Any, kwargs: Any, output: Any) -> Any:
        record = Record(self, frame, (main_input(args, kwargs),))
        if len(args) > 1 or (args and kwargs) or len(kwargs) > 1:
            record.args, record.kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args[1:], dict(kwargs)))
        tapped = tap_layer(output, record)
        return None if tapped is output else tapped

    def _call(self, record: Record, backprop: Tensor) -> Call:
        layout = self.layout_of(record, [backprop])
        size = self.recorder.batch_size
        sides: list[tuple[Tensor, int]] = []
        for tensor, axis in ((record.inputs[0], layout.inputs[0]), (backprop, layout.outputs[0])):
            if axis is None or isinstance(axis, Unclear):
                why = "it carries no batch axis" if axis is None else axis.reason
                raise PrivacyError(
                    f"Expected a batch axis in every call of module {self.name!r}, but {why}. {WAY_OUT}."
                )
            sides.append(axis.to_front(tensor, size, f"module {self.name!r}"))
        (activation, rows), (backprop, out_rows) = sides
        if rows != out_rows:
            raise PrivacyError(
                f"Expected as many rows a sample in as out, got {rows} and {out_rows} in module {self.name!r}. "
                f"{WAY_OUT}."
            )
        return Call((activation, *record.args), record.kwargs, activation, backprop, rows)

    def groups(self) -> list[tuple[set[str], list[Call]]]:
        """Return parameters that saw the same backprops, with their calls."""
        if self._groups_at == self.recorder.changes:
            return self._groups
        calls: dict[str, list[Call]] = {}
        for record in self.records:
            for (backprop,), names in record.parts:
                assert backprop is not None
                call = self._call(record, backprop)
                for name in names:
                    calls.setdefault(name, []).append(call)
        merged: dict[tuple[int, ...], tuple[set[str], list[Call]]] = {}
        for name, mine in calls.items():
            merged.setdefault(tuple(map(id, mine)), (set(), mine))[0].add(name)
        self._groups, self._groups_at = list(merged.values()), self.recorder.changes
        return self._groups

    def _asked(self, names: set[str]) -> Iterable[tuple[dict[str, str], list[Call]]]:
        for held, calls in self.groups():
            wanted = {self.local[name]: name for name in held & names}
            if wanted:
                yield wanted, calls

    @override
    def per_sample(self, names: set[str]) -> Grads:
        size = self.recorder.batch_size
        grads: Grads = {}
        for wanted, calls in self._asked(names):
            made = self.rule.per_sample(self.module, calls, size, set(wanted))
            grads.update((wanted[local], grad) for local, grad in made.items())
        return grads

    @override
    def squared_norms(self, names: set[str], masks: Mapping[str, Tensor]) -> Grads:
        if self.materialise:
            return super().squared_norms(names, masks)
        size = self.recorder.batch_size
        norms: Grads = {}
        for wanted, calls in self._asked(names):
            self._make_kept(wanted, calls)
            kept = self.memory()
            norms.update((name, norm_of(kept[name], masks.get(name))) for name in wanted.values() if name in kept)
            rest = {local for local, name in wanted.items() if name not in kept}
            masked = {local: masks[wanted[local]] for local in rest if wanted[local] in masks}
            if plain := rest - masked.keys():
                made = self.rule.squared_norms(self.module, calls, size, plain)
                norms.update((wanted[local], norm) for local, norm in made.items())
            if masked:
                made = self.rule.masked_squared_norms(self.module, calls, size, masked)
                norms.update((wanted[local], norm) for local, norm in made.items())
        return norms

    def _make_kept(self, wanted: dict[str, str], calls: list[Call]) -> None:
        """Make, of these parameters, the gradients that are kept: the small ones and those that pay and have room."""
        size, kept = self.recorder.batch_size, self.memory()
        missing = {local for local, name in wanted.items() if name not in kept}
        small = {
            local
            for local in missing
            if size * self.parameters[wanted[local]].numel() <= sum(call.backprop.numel() for call in calls)
        }
        if small:
            made = self.rule.per_sample(self.module, calls, size, small)
            kept.update((wanted[local], grad) for local, grad in made.items())
        if self.workspace is None:
            return
        for local in sorted(missing - small):
            if not self.rule.materialises(self.module, calls, size, local):
                continue
            backprop, parameter = calls[0].backprop, self.parameters[wanted[local]]
            shape = (size, *parameter.shape)
            buffer = self.workspace.take(wanted[local], shape, accumulation_dtype(backprop), backprop.device)
            if buffer is not None:
                self.rule.fill(self.module, calls, size, local, buffer)
                kept[wanted[local]] = buffer

    @override
    def add_weighted_sum(self, out: Mapping[str, Tensor], factors: Tensor, dead: Tensor | None) -> None:
        kept = self.memory()
        ready = {name: target for name, target in out.items() if self.materialise or name in kept}
        if ready:
            super().add_weighted_sum(ready, factors, dead)
        for wanted, calls in self._asked(out.keys() - ready.keys()):
            if dead is not None:
                calls = [_without(call, dead) for call in calls]
            targets = {local: out[name] for local, name in wanted.items()}
            self.rule.add_weighted_sum(self.module, calls, factors, self.recorder.batch_size, targets)


def _without(call: Call, dead: Tensor) -> Call:
    """Return the call with the rows of dead samples set to zero: 0 times a non-finite row is not 0."""
    rows = dead.repeat_interleave(call.multiplicity) if call.multiplicity > 1 else dead

    def cleared(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.masked_fill(rows.reshape(-1, *[1] * (tensor.dim() - 1)), 0.0)

    activation = cleared(call.activation)
    return replace(call, inputs=(activation, *call.inputs[1:]), activation=activation, backprop=cleared(call.backprop))


def expand_input(args: Any, kwargs: Any, batch_size: int) -> Any:
    """Return (args, kwargs) with the first tensor expanded to the batch: ``(1, T) -> (B, T)``, ``(T,) -> (B, T)``."""

    def expanded(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or tensor.shape[0] != 1:
            tensor = tensor.unsqueeze(0)
        return tensor.expand(batch_size, *tensor.shape[1:])

    if args and isinstance(args[0], Tensor):
        return (expanded(args[0]), *args[1:]), kwargs
    key = next(key for key, value in kwargs.items() if tensors_of(value))
    return args, {**kwargs, key: expanded(kwargs[key])}


class ExpandUnit(Source):
    """Bare parameters of shape ``(1, ...)``: each sample gets a row of its own, whose gradient is the sample's."""

    @override
    def replacement(self, slot: Slot, frame: Frame) -> Tensor:
        record = Record(self, frame, ())
        record.args = (slot.name,)
        tensor = slot.parameter.detach()
        return tap(tensor.expand(self.recorder.batch_size, *tensor.shape[1:]), record)

    @override
    def per_sample(self, names: set[str]) -> Grads:
        grads: Grads = {}
        for record in self.records:
            name = record.args[0]
            for (backprop,), left in record.parts:
                if name in names and name in left:
                    assert backprop is not None
                    grad = widen(backprop).unsqueeze(1)
                    grads[name] = grads[name] + grad if name in grads else grad
        return grads

    @override
    def live(self) -> set[str]:
        return {record.args[0] for record in self.records for _, left in record.parts if record.args[0] in left}


def zero_gradient(parameter: Tensor, batch_size: int) -> Tensor:
    """Return the per-sample gradients of a parameter that no backprop reached."""
    return torch.zeros(batch_size, *parameter.shape, dtype=accumulation_dtype(parameter), device=parameter.device)
