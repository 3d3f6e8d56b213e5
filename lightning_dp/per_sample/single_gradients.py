"""SingleGradients: gradients of samples that ran one after another, clipped together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample._torch import add_scaled, flattened
from lightning_dp.per_sample.base import SampleGradients
from lightning_dp.per_sample.combining import add_combined, zero_gradient
from lightning_dp.per_sample.rules.base import LONGEST_SUM, norms_of_blocks

_MOST_ELEMENTS = 2**21
"""Elements of all gradients that wait to be clipped: they stay in a cache of the last level."""
_MOST_SAMPLES = 64
_LARGE_TABLE = 2**19
"""Elements of a gradient from which it pays to leave out rows that are zero, as most rows of an embedding are."""


class SingleGradients(SampleGradients):
    """Gradients of samples that ran one after another.

    Args:
        parameters: private parameters by name.
        samples: of each, the tensors that autograd has made; zero for parameters without an entry.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], samples: Sequence[Mapping[str, Tensor]]) -> None:
        self._parameters, self._samples = parameters, samples
        self._rows: dict[tuple[int, str], Tensor] = {}  # norms of the rows of large tables, by sample and name

    @override
    def squared_norms(
        self, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask] | None = None
    ) -> Tensor:
        masks = masks or {}
        with self._arithmetic():
            norms = self._new_norms(len(groups), len(self._samples))
            for row, group in zip(norms, groups, strict=True):
                for index, sample in enumerate(self._samples):
                    if parts := _active(sample, group, masks):
                        row[index] = self._squared_norm(index, parts)
            return norms

    @override
    def accumulate(
        self,
        factors: Tensor,
        groups: Sequence[Sequence[str]],
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask] | None = None,
        scratch: Mapping[str, Tensor] | None = None,
    ) -> None:
        masks = masks or {}
        with self._arithmetic():
            if factors.device.type != "cpu":  # without waiting for the device
                for row, group in zip(factors, groups, strict=True):
                    for name in group:
                        grads = self.per_sample_gradients([name])[name]
                        active = masks[name].select_rows(grads) if name in masks else grads
                        add_combined(out[name], active, row, row == 0)
                return
            for row, group in zip(factors.tolist(), groups, strict=True):
                for index, (factor, sample) in enumerate(zip(row, self._samples, strict=True)):
                    if factor:
                        parts = _active(sample, group, masks)
                        self._add_rows(index, factor, parts, out)
                        add_scaled([out[name] for name in parts], [*parts.values()], factor)

    def _squared_norm(self, index: int, grads: Mapping[str, Tensor]) -> Tensor:
        """Return the squared norm of gradients of one sample together, in float64 if the device has it."""
        parts = []
        for name, grad in grads.items():
            if grad.numel() >= _LARGE_TABLE and grad.dim() == 2 and grad.shape[1] <= LONGEST_SUM:
                grad = self._rows[index, name] = torch.linalg.vector_norm(grad, dim=1)
            parts.append(norms_of_blocks(grad, 1) if grad.numel() > LONGEST_SUM else grad)
        joined = flattened(parts)
        norm: Tensor = torch.linalg.vector_norm(joined, dtype=None if joined.is_mps else torch.float64)
        return norm.square()

    def _add_rows(self, index: int, factor: float, parts: dict[str, Tensor], out: Mapping[str, Tensor]) -> None:
        """Add the gradients of large tables that are zero in most rows, and remove them from the others."""
        for name in [name for name in parts if (index, name) in self._rows]:
            norms, grad, target = self._rows[index, name], parts[name], out[name]
            rows = norms.nonzero().view(-1)  # also those that are not finite; entries below 1e-22 may count as zero
            if 4 * len(rows) <= len(norms) and grad.dtype == target.dtype and grad.dim() == 2:
                target.index_add_(0, rows, grad.index_select(0, rows), alpha=factor)
                del parts[name]

    @override
    def per_sample_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        asked = self._parameters if names is None else names
        found = {name: zero_gradient(self._parameters[name], len(self._samples)) for name in asked}
        for name, rows in found.items():
            for row, sample in zip(rows, self._samples, strict=True):
                if name in sample:
                    row.copy_(sample[name])
        return found

    @override
    def _arithmetic(self) -> AbstractContextManager[None]:
        # sums of squares and of products with a number have no shortened form; autocast may still change their types
        kind = next((parameter.device.type for parameter in self._parameters.values()), "cpu")
        if kind != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled(kind):
            return super()._arithmetic()
        return nullcontext()


def most_kept(parameters: Iterable[Tensor]) -> int:
    """Return the number of samples that are clipped together at most: one if their gradients are large."""
    return max(1, min(_MOST_SAMPLES, _MOST_ELEMENTS // max(1, sum(each.numel() for each in parameters))))


def _active(grads: Mapping[str, Tensor], names: Iterable[str], masks: Mapping[str, ParameterMask]) -> dict[str, Tensor]:
    """Return the gradients of these parameters, or their active entries, without those that are zero."""
    return {name: masks[name].select(grads[name]) if name in masks else grads[name] for name in names if name in grads}
