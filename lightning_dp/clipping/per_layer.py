"""One bound for each module that owns parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.clipping.base import FactorClipping, check_bound, check_groups, clip_factors


@dataclass(frozen=True)
class PerLayerClipping(FactorClipping):
    """Clip the norm of each module's gradient on its own.

        f_l = min(1, R_l / ||g_il||);   R_l = R / sqrt(G) unless given

    One group is one module that owns parameters: all names equal up to the last dot.

    **Guarantee**: see ``Clipping``; sensitivity sqrt(sum_l R_l^2), which is R for the default bounds.

    Args:
        max_grad_norm: R, the bound over all groups, finite and > 0; not used where ``max_grad_norms`` is given.
        max_grad_norms: the bounds R_l: one a group in the order of ``groups``, or a mapping from module name (the
            parameters' name up to the last dot, "" for the root) to bound. ``None``: R / sqrt(G) each.

    Raises:
        ValueError: a bound out of range; bounds that do not match the groups.

    Example:
        >>> clipping = PerLayerClipping(1.0)
        >>> clipping.groups(["conv.weight", "conv.bias", "head.weight"])
        [['conv.weight', 'conv.bias'], ['head.weight']]
        >>> PerLayerClipping(max_grad_norms=(3.0, 4.0)).sensitivity(2)
        5.0

    References:
        McMahan et al. 2018, A General Approach to Adding Differential Privacy to Iterative Training Procedures,
        section 3.
    """

    max_grad_norm: float = 1.0
    max_grad_norms: Sequence[float] | Mapping[str, float] | None = None
    name: ClassVar[str] = "per_layer"

    def __post_init__(self) -> None:
        check_bound("max_grad_norm", self.max_grad_norm)
        if self.max_grad_norms is None:
            return
        # Copied, so that a caller's later change cannot move the bound below the noise.
        if isinstance(self.max_grad_norms, Mapping):
            object.__setattr__(self, "max_grad_norms", dict(self.max_grad_norms))
        else:
            object.__setattr__(self, "max_grad_norms", tuple(self.max_grad_norms))
        for index, bound in enumerate(self._given_bounds()):
            check_bound(f"max_grad_norms[{index}]", bound)

    @override
    def groups(self, parameters: Iterable[str]) -> list[list[str]]:
        owned = by_module(parameters)
        if isinstance(self.max_grad_norms, Mapping):
            if set(owned) != set(self.max_grad_norms):
                raise ValueError(
                    f"Expected max_grad_norms to name exactly the modules {sorted(owned)}, got "
                    f"{sorted(self.max_grad_norms)}. Every trainable parameter needs a bound."
                )
            return [owned[module] for module in self.max_grad_norms]
        return list(owned.values())

    @override
    def sensitivity(self, num_groups: int) -> float:
        if self.max_grad_norms is None:
            check_groups(num_groups, None)
            return self.max_grad_norm
        check_groups(num_groups, len(self.max_grad_norms))
        return math.hypot(*self._given_bounds())

    @override
    def scaled(self, factor: float) -> PerLayerClipping:
        check.check_positive("factor", factor)
        bounds = self.max_grad_norms
        if isinstance(bounds, Mapping):
            bounds = {module: bound * factor for module, bound in bounds.items()}
        elif bounds is not None:
            bounds = [bound * factor for bound in bounds]
        return replace(self, max_grad_norm=self.max_grad_norm * factor, max_grad_norms=bounds)

    @override
    def _raw_factors(self, norms: Tensor) -> Tensor:
        num_groups = norms.shape[0]
        if self.max_grad_norms is None:
            return clip_factors(norms, self.max_grad_norm / math.sqrt(num_groups))
        check_groups(num_groups, len(self.max_grad_norms))
        bounds = self._given_bounds()
        return torch.stack([clip_factors(row, bound) for row, bound in zip(norms, bounds, strict=True)])

    def _given_bounds(self) -> list[float]:
        assert self.max_grad_norms is not None
        given = self.max_grad_norms
        return list(given.values() if isinstance(given, Mapping) else given)


def by_module(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Return the parameters of each module that owns any, in their order: all names equal up to the last dot."""
    owned: dict[str, list[str]] = {}
    for parameter in parameters:
        owned.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return owned
