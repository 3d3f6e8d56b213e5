"""KeptSamples: gradients of samples that ran one after another, kept to be clipped together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample._torch import copy_all
from lightning_dp.per_sample.base import SampleGradients
from lightning_dp.per_sample.combining import add_combined, norm_of
from lightning_dp.per_sample.rules.base import accumulation_dtype, is_cheap_to_read

_MOST_ELEMENTS = 2**21
"""Elements of all kept gradients: in a cache of the last level, a copy costs less than the calls that it saves."""
_MOST_SAMPLES = 64


class KeptSamples(SampleGradients):
    """Gradients of samples that ran one after another, so that clipping takes as many calls for all as for one.

    Args:
        parameters: private parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters, self.num = dict(parameters), 0
        most = most_kept(parameters.values())
        self._stacks = {
            name: torch.empty(most, *each.shape, dtype=accumulation_dtype(each), device=each.device)
            for name, each in parameters.items()
        }
        self._rows = [{name: stack[row] for name, stack in self._stacks.items()} for row in range(most)]

    def write(self, position: int, grads: Mapping[str, Tensor]) -> None:
        """Write the gradients of one sample; those of parameters that are left out are zero."""
        row = self._rows[position]
        for name in row.keys() - grads.keys():
            row[name].zero_()
        copy_all([row[name] for name in grads], [*grads.values()])

    @override
    def squared_norms(
        self, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask] | None = None
    ) -> Tensor:
        with self._arithmetic():
            norms = self._new_norms(len(groups), self.num)
            wide = norms if norms.device.type == "mps" else norms.double()
            for row, group in zip(wide, groups, strict=True):
                for name in group:
                    row += norm_of(self._stacks[name][: self.num], (masks or {}).get(name))
            return wide.to(norms.dtype)

    @override
    def accumulate(
        self,
        factors: Tensor,
        groups: Sequence[Sequence[str]],
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask] | None = None,
        scratch: Mapping[str, Tensor] | None = None,
    ) -> None:
        with self._arithmetic():
            dropped = factors == 0
            all_count = is_cheap_to_read(factors) and not bool(dropped.any())
            for row, dead, group in zip(factors, dropped, groups, strict=True):
                for name in group:
                    grads, mask = self._stacks[name][: self.num], (masks or {}).get(name)
                    active = grads if mask is None else mask.select_rows(grads)
                    add_combined(out[name], active, row, None if all_count else dead)

    @override
    def per_sample_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        return {name: self._stacks[name][: self.num] for name in (self._stacks if names is None else names)}


def most_kept(parameters: Iterable[Tensor]) -> int:
    """Return the number of samples whose gradients are kept at most; 0 if they are too large to be kept."""
    most = min(_MOST_SAMPLES, _MOST_ELEMENTS // max(1, sum(each.numel() for each in parameters)))
    return most if most > 1 else 0
