"""What a unit says about its parameters, and the simplest unit: an expanded parameter.

There are three ways to per-sample gradients: a rule for the layer (rule_unit.py), an expanded parameter, a recomputation
(fallback.py). Every unit answers the same three questions for its parameters, by qualified name: the gradients, their squared norms,
their weighted sum. ``B`` samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import WAY_OUT, CallLayout, Unclear
from lightning_dp.per_sample.recorder import Frame, Record, Recorder, Slot, Unit, tap
from lightning_dp.per_sample.rules.base import (
    accumulation_dtype,
    masked_squared_norm,
    squared_norm,
    widen,
)

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

    def add_live_entries(
        self, out: Mapping[str, Tensor], masks: Mapping[str, Tensor], factors: Tensor, dead: Tensor | None
    ) -> set[str]:
        """Add what the masks keep of the weighted sum, where that can be had without the rest of it.

        Args:
            out: what is added to, for every parameter that is asked for and live: the kept entries in a row.
            masks: boolean, of the parameters' shapes.
            factors: shape ``(B,)``.
            dead: marks the samples of factor 0; None if there are none.

        Returns:
            The parameters for which this was done.
        """
        return set()

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
