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


class SingleGradients(SampleGradients):
    """Gradients of samples that ran one after another.

    Args:
        parameters: private parameters by name.
        samples: of each, the tensors that autograd has made; zero for parameters without an entry.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], samples: Sequence[Mapping[str, Tensor]]) -> None:
        self._parameters, self._samples = parameters, samples

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
                        row[index] = _squared_norm(parts.values())
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
                for factor, sample in zip(row, self._samples, strict=True):
                    if factor and (parts := _active(sample, group, masks)):
                        add_scaled([out[name] for name in parts], [*parts.values()], factor)

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
    """Return the number of samples that wait to be clipped together at most; 0 if their gradients are too large."""
    most = min(_MOST_SAMPLES, _MOST_ELEMENTS // max(1, sum(each.numel() for each in parameters)))
    return most if most > 1 else 0


def _active(grads: Mapping[str, Tensor], names: Iterable[str], masks: Mapping[str, ParameterMask]) -> dict[str, Tensor]:
    """Return the gradients of these parameters, or their active entries, without those that are zero."""
    return {name: masks[name].select(grads[name]) if name in masks else grads[name] for name in names if name in grads}


def _squared_norm(grads: Iterable[Tensor]) -> Tensor:
    """Return the squared norm of these gradients together, in float64 if the device has it."""
    parts = flattened([norms_of_blocks(grad, 1) if grad.numel() > LONGEST_SUM else grad for grad in grads])
    norm: Tensor = torch.linalg.vector_norm(parts, dtype=None if parts.is_mps else torch.float64)
    return norm.square()
