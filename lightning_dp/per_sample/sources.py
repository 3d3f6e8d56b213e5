"""Per-sample gradients of the tensors of one operation: in full, as squared norms, or as a weighted sum.

If that frees memory, the gradients are computed during the backward, as soon as the backprop arrives. Then neither
input nor backprop is kept, and the backward needs no more memory than a non-private one. Computations that need other
forms of the whole batch (Gram matrices, several uses) wait for the end of the backward. ``B`` samples.

A key names the tensor that a gradient belongs to: the qualified name of a parameter, or a node (nodes.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample._torch import keeps_graph
from lightning_dp.per_sample.calls import call_of, calls_of, without
from lightning_dp.per_sample.combining import add_combined, is_joined, norm_of
from lightning_dp.per_sample.owners.owned import OwnedAxis
from lightning_dp.per_sample.precision import exact_arithmetic
from lightning_dp.per_sample.rules.base import Call, Rule, accumulation_dtype, squared_norm
from lightning_dp.per_sample.tracking.nodes import Node
from lightning_dp.per_sample.tracking.uses import FEW, Recorder, Use
from lightning_dp.per_sample.workspace import Workspace

Grads = dict[Hashable, Tensor]

MOST_ACTIVE = 0.5
"""Largest share of active entries that are cached by themselves: to pick an entry costs more than to pass it over."""


class Source:
    """All uses of the same tensors in the same operation.

    Args:
        recorder: shared state.
        rule: mathematics of the operation.
        spec: settings of the operation that its rule reads.
        operation: name of the operation, for messages.
        nodes: local name in the rule, such as ``"weight"``, to the node whose gradients are computed.
        materialise: always compute the full per-sample gradients.
        workspace: buffers for gradients between norms and weighted sum; None to cache small ones only.
    """

    def __init__(
        self,
        recorder: Recorder,
        rule: Rule,
        spec: Any,
        operation: str,
        nodes: Mapping[str, Node],
        *,
        materialise: bool,
        workspace: Workspace | None,
    ) -> None:
        self.recorder, self.rule, self.spec = recorder, rule, spec
        self.nodes = {node.key: node for node in nodes.values()}
        self.is_lasting = all(node.is_view for node in nodes.values())
        self.key_of = {local: node.key for local, node in nodes.items()}
        self.local = {key: local for local, key in self.key_of.items()}
        self.keys = frozenset(self.nodes)
        self._operation = operation
        self.materialises, self._workspace = materialise, workspace
        self.uses: list[Use] = []
        self.calls, self._computed_at = 0, -1  # the rest is of the backprops up to that change
        self._cached: Grads = {}
        self._groups: list[tuple[set[Hashable], list[Call]]] | None = None
        self._active: dict[tuple[Hashable, ParameterMask], Tensor] = {}  # active entries of the gradients
        self._made: Grads = {}  # computed within the backward; later backprops are then added to them
        self._not_at_once: set[Any] = set()  # shapes for which caching was slower or had no buffer

    def __str__(self) -> str:
        return f"{self._operation} with {', '.join(repr(node.name) for node in self.nodes.values())}"

    def clear(self) -> None:
        """Forget all uses and all cached gradients."""
        self.uses, self.calls = [], 0
        self._made, self._computed_at = {}, -1
        self._forget_older()

    def _forget_older(self) -> None:
        """Forget what was computed before the last backprop arrived."""
        if self._computed_at != self.recorder.changes:
            self._computed_at = self.recorder.changes
            self._cached, self._groups, self._active = {}, None, {}

    def live(self) -> frozenset[Hashable]:
        """Return the keys for which a backprop arrived."""
        received = {keys for use in self.uses for _, keys in use.parts}
        return frozenset(self._made).union(*received) if self._made or len(received) != 1 else received.pop()

    def discard(self, keys: frozenset[Hashable]) -> None:
        """Drop the backprops received so far for these keys; uses that are still in a graph remain valid."""
        for use in self.uses:
            use.forget(keys)
        self.uses = [use for use in self.uses if use.parts]
        self._made = {key: grad for key, grad in self._made.items() if key not in keys}

    def received(self, use: Use) -> None:
        """Compute the gradients immediately, during the backward, if that frees memory."""
        if self.materialises or self.uses != [use] or len(use.parts) != 1 or isinstance(use.out_axis, OwnedAxis):
            return
        backprop, keys = use.parts[0]
        if not self._made and self.recorder.may_wait(backprop.numel() + sum(map(Tensor.numel, use.inputs))):
            use.done = bool(use.inputs) and not keeps_graph()
            return
        shapes = (use.inputs[0].shape if use.inputs else None, backprop.shape, keys)
        if not self._made and (self.calls != 1 or shapes in self._not_at_once):
            return
        with exact_arithmetic(backprop.device.type):
            use.check_unchanged()
            call = call_of(self.recorder, use, backprop)
            if self._made:
                self._add_made(call, keys)
            elif not self._make_at_once(call, keys):
                self._not_at_once.add(shapes)
                return
        self.uses = []
        use.release()

    def _make_at_once(self, call: Call, keys: frozenset[Hashable]) -> bool:
        """Compute the gradients if all of them can be cached; return whether this was done."""
        buffers = self._buffers(keys, [call])
        if all_fit := len(buffers) == len(keys):
            self._make_cached(buffers, [call], self._made)
        return all_fit

    def _add_made(self, call: Call, keys: frozenset[Hashable]) -> None:
        """Add the gradients of another backprop to those computed during the backward."""
        made = self.rule.per_sample(self.spec, [call], self.recorder.num_samples, {self.local[key] for key in keys})
        for key in keys:
            before, grad = self._made.get(key), made[self.local[key]]
            self._made[key] = grad if before is None else before + grad

    def groups(self) -> list[tuple[set[Hashable], list[Call]]]:
        """Return groups of keys that received the same backprops, with their calls."""
        self._forget_older()
        if self._groups is None:
            self._groups = calls_of(self.recorder, self.uses)
        return self._groups

    def _asked(self, keys: set[Hashable]) -> Iterable[tuple[dict[str, Hashable], list[Call]]]:
        for held, calls in self.groups():
            if wanted := {self.local[key]: key for key in held & keys}:
                yield wanted, calls

    def memory(self) -> Grads:
        """Return the cache of gradients computed since the last backprop; callers read and extend it."""
        self._forget_older()
        self._cached.update(self._made)
        return self._cached

    def per_sample(self, keys: set[Hashable]) -> Grads:
        """Return gradients of shape ``(B, *shape)`` for the keys that received a backprop."""
        grads: Grads = {}
        for wanted, calls in self._asked(keys):
            made = self.rule.per_sample(self.spec, calls, self.recorder.num_samples, set(wanted))
            grads.update((wanted[local], grad) for local, grad in made.items())
        return grads

    def cached(self, keys: set[Hashable]) -> Grads:
        """Return the gradients of these keys, cached ones first; cache new ones if the settings allow."""
        memory = self.memory()
        made = self.per_sample(missing) if (missing := keys - memory.keys()) else {}
        grads = {**{key: memory[key] for key in keys - missing}, **made}
        if self._workspace is not None or self.materialises:
            memory.update(made)
        return grads

    def squared_norms(self, keys: set[Hashable], masks: Mapping[Hashable, ParameterMask]) -> tuple[Grads, Grads]:
        """Return squared norms ``(B,)`` of the (masked) gradients; of other keys, gradients with few numbers, of which
        the caller computes norms and sums together.
        """
        if self.materialises:
            return {key: norm_of(grad, masks.get(key)) for key, grad in self.cached(keys).items()}, {}
        size, cached = self.recorder.num_samples, self.memory()
        norms, joined = Grads(), Grads()
        for wanted, calls in self._asked(keys - cached.keys()):
            self._make_cached(self._buffers(wanted.values(), calls), calls, cached)
            rest = {local for local, key in wanted.items() if key not in cached}
            masked = {local: masks[wanted[local]] for local in rest if wanted[local] in masks}
            if plain := rest - masked.keys():
                made = self.rule.squared_norms(self.spec, calls, size, plain)
                norms.update((wanted[local], norm) for local, norm in made.items())
            for local in sorted(masked):
                entries = self._active_entries(wanted[local], calls, masked[local])
                if entries is not None:
                    norms[wanted[local]] = squared_norm(entries)
                    del masked[local]
            if masked:
                made = self.rule.masked_squared_norms(self.spec, calls, size, masked)
                norms.update((wanted[local], norm) for local, norm in made.items())
        for key in keys & cached.keys():
            grad = cached[key]
            if is_joined(grad, masks.get(key)):
                joined[key] = grad
            else:
                norms[key] = norm_of(grad, masks.get(key))
        return norms, joined

    def _make_cached(self, buffers: Mapping[Hashable, Tensor | None], calls: list[Call], cached: Grads) -> None:
        """Compute gradients into the buffers, and those without a buffer as new tensors."""
        size = self.recorder.num_samples
        if new := {self.local[key]: key for key, buffer in buffers.items() if buffer is None}:
            made = self.rule.per_sample(self.spec, calls, size, set(new))
            cached.update((new[local], grad) for local, grad in made.items())
        for key, buffer in buffers.items():
            if buffer is not None:
                self.rule.fill(self.spec, calls, size, self.local[key], buffer)
                cached[key] = buffer

    def _active_entries(self, key: Hashable, calls: list[Call], mask: ParameterMask) -> Tensor | None:
        """Return the active entries of every sample's gradient, cached; None if many, of no use, or too large."""
        local, size = self.local[key], self.recorder.num_samples
        if not self.rule.prefers_active_entries(calls, size, local) or mask.share > MOST_ACTIVE:
            return None
        num = size * mask.num_active
        if num > sum(call.backprop.numel() for call in calls):
            num_bytes = num * accumulation_dtype(calls[0].backprop).itemsize
            if self._workspace is None or not self._workspace.admits((key, "active"), num_bytes):
                return None
        self._forget_older()
        self._active[key, mask] = entries = self.rule.active_entries(self.spec, calls, size, local, mask)
        return entries

    def _buffers(self, keys: Iterable[Hashable], calls: list[Call]) -> dict[Hashable, Tensor | None]:
        """Return the keys whose gradients are cached, because they are no larger than their backprops or because that
        is faster and memory allows; each with its reused buffer, or None for a new tensor.
        """
        size, backprop, workspace = self.recorder.num_samples, calls[0].backprop, self._workspace
        most = sum(call.backprop.numel() for call in calls)
        dtype = accumulation_dtype(backprop)
        buffers: dict[Hashable, Tensor | None] = {}
        for key in sorted(keys, key=self.local.__getitem__):
            local, num = self.local[key], size * self.nodes[key].numel
            if num <= most:
                buffers[key] = None
            elif workspace is None or (num > FEW and not self.rule.materialises(self.spec, calls, size, local)):
                continue
            elif self.rule.fills_buffers:
                buffer = workspace.take(key, (size, *self.nodes[key].shape), dtype, backprop.device)
                if buffer is not None:
                    buffers[key] = buffer
            elif workspace.admits(key, num * dtype.itemsize):
                buffers[key] = None
        return buffers

    def add_active_entries(
        self,
        out: Mapping[Hashable, Tensor],
        masks: Mapping[Hashable, ParameterMask],
        factors: Tensor,
        dead: Tensor | None,
    ) -> set[Hashable]:
        """Add the active entries of the weighted sum, if they can be computed without the other entries.

        Args:
            out: 1-D accumulation targets by key, for every masked key that is asked for and live.
            masks: of these tensors.
            factors: shape ``(B,)``.
            dead: marks the samples of factor 0; None if there are none.

        Returns:
            The keys for which this was done.
        """
        self._forget_older()
        done = {key for key in out if (key, masks[key]) in self._active}
        for key in done:
            add_combined(out[key], self._active[key, masks[key]], factors, dead)
        for wanted, calls in self._asked(out.keys() - self.memory().keys() - done):
            if dead is not None:
                calls = [without(call, dead) for call in calls]
            targets = {local: out[key] for local, key in wanted.items()}
            mine = {local: masks[key] for local, key in wanted.items()}
            added = self.rule.add_active_entries(self.spec, calls, factors, self.recorder.num_samples, targets, mine)
            done |= {wanted[local] for local in added}
        return done

    def add_weighted_sum(self, out: Mapping[Hashable, Tensor], factors: Tensor, dead: Tensor | None) -> None:
        """Add ``sum_i factors[i] gradient_i`` to ``out[key]``.

        Args:
            out: accumulation targets by key, for every key that is asked for and live.
            factors: shape ``(B,)``.
            dead: marks the samples of factor 0; None if there are none.
        """
        memory = self.memory()
        ready = {key for key in out if self.materialises or key in memory}
        for key, grad in self.cached(ready).items() if ready else ():
            add_combined(out[key], grad, factors, dead)
        for wanted, calls in self._asked(out.keys() - ready):
            if dead is not None:
                calls = [without(call, dead) for call in calls]
            targets = {local: out[key] for local, key in wanted.items()}
            self.rule.add_weighted_sum(self.spec, calls, factors, self.recorder.num_samples, targets)
