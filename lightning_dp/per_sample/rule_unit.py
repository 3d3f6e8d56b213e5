"""A layer with a rule: its per-sample gradients from what went in and what came back.

Where that frees memory they are made within the backward, as soon as the backprop is there: then neither input nor backprop
is kept, and a backward holds no more than one without privacy. What needs the whole batch in another form (Gram matrices,
several calls) waits for the end of the backward. ``B`` samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import WAY_OUT, Unclear, tensors_of
from lightning_dp.per_sample.precision import exact_arithmetic
from lightning_dp.per_sample.recorder import Frame, Record, main_input, tap_layer
from lightning_dp.per_sample.rules.base import Call, Rule, accumulation_dtype, squared_norm
from lightning_dp.per_sample.rules.sparse_mask import places_of
from lightning_dp.per_sample.units import Grads, Source, add_combined, norm_of
from lightning_dp.per_sample.workspace import Workspace

MOST_LIVE = 0.5
"""Largest share of live entries of which gradients are kept by themselves: to pick an entry costs more than to pass it over."""


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
        self._made: Grads = {}  # within the backward; while there are any, every further backprop is added to them
        self._live: dict[str, tuple[Tensor, Tensor]] = {}  # what a mask keeps of the gradients, and where that is
        self._live_at = -1
        self._not_at_once: set[Any] = set()  # shapes for which that did not pay or had no room
        self._groups: list[tuple[set[str], list[Call]]] = []
        self._groups_at = -1
        rule.check(self.module, self.name)

    @override
    def clear(self) -> None:
        super().clear()
        self._made, self._live = {}, {}
        self._groups, self._groups_at = [], -1

    @override
    def live(self) -> set[str]:
        return super().live() | self._made.keys()

    @override
    def memory(self) -> Grads:
        kept = super().memory()
        kept.update(self._made)
        return kept

    @override
    def discard(self, names: frozenset[str]) -> None:
        super().discard(names)
        self._made = {name: grad for name, grad in self._made.items() if name not in names}

    @override
    def received(self, record: Record) -> None:
        if self.materialise or self.records != [record] or len(record.parts) != 1:
            return
        (backprop,), names = record.parts[0]
        assert backprop is not None
        shapes = (record.inputs[0].shape, backprop.shape, names)
        if not self._made and (self.calls != 1 or shapes in self._not_at_once):
            return
        with exact_arithmetic(backprop.device.type):
            record.check_unchanged()
            call = self._call(record, backprop)
            if self._made:
                self._add_made(call, names)
            elif not self._make_at_once(call, names):
                self._not_at_once.add(shapes)
                return
        self.records = []
        record.let_go()

    def _make_at_once(self, call: Call, names: frozenset[str]) -> bool:
        """Make the gradients if all of them are to be kept: then nothing of the call needs to be."""
        small = {name for name in names if self._is_small(name, [call])}
        if not all(self._is_kept(name, [call]) for name in names - small):
            return False
        self._make_kept(names, [call], self._made)
        return True

    def _add_made(self, call: Call, names: frozenset[str]) -> None:
        """Add the gradients of a further backprop."""
        made = self.rule.per_sample(self.module, [call], self.recorder.batch_size, {self.local[name] for name in names})
        for name in names:
            grad = made[self.local[name]]
            self._made[name] = self._made[name] + grad if name in self._made else grad

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
        self.recorder.count(record.inputs[0])
        if isinstance(output, Tensor):
            self.recorder.count(output)
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
        size, kept = self.recorder.batch_size, self.memory()
        norms: Grads = {}
        for wanted, calls in self._asked(names - kept.keys()):
            self._make_kept(wanted.values(), calls, kept)
            rest = {local for local, name in wanted.items() if name not in kept}
            masked = {local: masks[wanted[local]] for local in rest if wanted[local] in masks}
            if plain := rest - masked.keys():
                made = self.rule.squared_norms(self.module, calls, size, plain)
                norms.update((wanted[local], norm) for local, norm in made.items())
            for local in sorted(masked):
                entries = self._live_entries(wanted[local], calls, masked[local])
                if entries is not None:
                    norms[wanted[local]] = squared_norm(entries)
                    del masked[local]
            if masked:
                made = self.rule.masked_squared_norms(self.module, calls, size, masked)
                norms.update((wanted[local], norm) for local, norm in made.items())
        norms.update((name, norm_of(kept[name], masks.get(name))) for name in names & kept.keys())
        return norms

    def _make_kept(self, names: Iterable[str], calls: list[Call], kept: Grads) -> None:
        """Make, of these parameters, the gradients that are kept: the small ones and those that pay and have room."""
        size = self.recorder.batch_size
        small = {self.local[name]: name for name in names if self._is_small(name, calls)}
        if small:
            made = self.rule.per_sample(self.module, calls, size, set(small))
            kept.update((small[local], grad) for local, grad in made.items())
        for name in sorted(set(names) - set(small.values())):
            if not self._is_kept(name, calls):
                continue
            local = self.local[name]
            buffer = self._buffer(name, calls)
            if buffer is None:
                kept[name] = self.rule.per_sample(self.module, calls, size, {local})[local]
            else:
                self.rule.fill(self.module, calls, size, local, buffer)
                kept[name] = buffer

    def _live_entries(self, name: str, calls: list[Call], mask: Tensor) -> Tensor | None:
        """Return what a mask keeps of every sample's gradient, and keep it: where that is little, pays and has room."""
        local, size = self.local[name], self.recorder.batch_size
        if not self.rule.picks(calls, size, local):
            return None
        places = places_of(mask)
        num = size * len(places)
        if len(places) > MOST_LIVE * mask.numel():
            return None
        if num > sum(call.backprop.numel() for call in calls):
            num_bytes = num * accumulation_dtype(calls[0].backprop).itemsize
            if self.workspace is None or not self.workspace.admits((name, "live"), num_bytes):
                return None
        entries = self.rule.live_entries(self.module, calls, size, local, places)
        self._memory_of_live()[name] = (entries, places)
        return entries

    def _memory_of_live(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what masks kept of gradients since the last backprop came."""
        if self._live_at != self.recorder.changes:
            self._live, self._live_at = {}, self.recorder.changes
        return self._live

    def _is_small(self, name: str, calls: list[Call]) -> bool:
        """Whether the gradients of a parameter take no more memory than the backprops they are made of."""
        size = self.recorder.batch_size * self.parameters[name].numel()
        return size <= sum(call.backprop.numel() for call in calls)

    def _is_kept(self, name: str, calls: list[Call]) -> bool:
        """Whether the gradients of a parameter, not small, are kept: where that pays and there is room."""
        size = self.recorder.batch_size
        if self.workspace is None or not self.rule.materialises(self.module, calls, size, self.local[name]):
            return False
        if self.rule.fills_buffers:
            return self._buffer(name, calls) is not None
        num_bytes = size * self.parameters[name].numel() * accumulation_dtype(calls[0].backprop).itemsize
        return self.workspace.admits(name, num_bytes)

    def _buffer(self, name: str, calls: list[Call]) -> Tensor | None:
        """Return where the gradients of a parameter are written in every microbatch, if they are."""
        assert self.workspace is not None
        if not self.rule.fills_buffers:
            return None
        backprop, shape = calls[0].backprop, (self.recorder.batch_size, *self.parameters[name].shape)
        return self.workspace.take(name, shape, accumulation_dtype(backprop), backprop.device)

    @override
    def add_live_entries(
        self, out: Mapping[str, Tensor], masks: Mapping[str, Tensor], factors: Tensor, dead: Tensor | None
    ) -> set[str]:
        done: set[str] = set()
        for name, (entries, places) in self._memory_of_live().items():
            if name in out and places is places_of(masks[name]):
                add_combined(out[name], entries, factors, dead)
                done.add(name)
        for wanted, calls in self._asked(out.keys() - self.memory().keys() - done):
            if dead is not None:
                calls = [_without(call, dead) for call in calls]
            targets = {local: out[name] for local, name in wanted.items()}
            kept = {local: masks[name] for local, name in wanted.items()}
            added = self.rule.add_live_entries(self.module, calls, factors, self.recorder.batch_size, targets, kept)
            done |= {wanted[local] for local in added}
        return done

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
