"""Normalisation in place of clipping: AUTO-S, AUTO-V, and the code that all normalising clippings share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_dp import _validate as check
from lightning_dp.clipping.base import FactorClipping, check_bound, check_groups, safe_quotients
from lightning_dp.clipping.per_layer import by_module

# Squares of coordinates vanish in float32 near here: a smaller norm cannot be trusted as a divisor.
_SMALLEST_DIVISOR = 1e-15


@dataclass(frozen=True)
class NormalisingClipping(FactorClipping):
    """A clipping that scales every gradient by R over a number that is at least the norm of the gradient.

        f = R / divisor(||g_i||),   divisor(x) >= x;   per layer R / sqrt(G)

    **Guarantee**: see ``Clipping``; sensitivity R. Where the divisor is below 1e-15 the contribution is zero: a norm
    that small cannot be computed in float32.
    """

    gamma: float = 0.01
    max_grad_norm: float = 1.0
    per_layer: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"Expected 0 <= gamma < inf, got gamma={self.gamma}. Take 0.01, the papers' choice.")
        check_bound("max_grad_norm", self.max_grad_norm)

    @override
    def groups(self, parameters: Iterable[str]) -> list[list[str]]:
        return list(by_module(parameters).values()) if self.per_layer else super().groups(parameters)

    @override
    def sensitivity(self, num_groups: int) -> float:
        check_groups(num_groups, None if self.per_layer else 1)
        return self.max_grad_norm

    @override
    def scaled(self, factor: float) -> Self:
        return replace(self, max_grad_norm=self.max_grad_norm * check.check_positive("factor", factor))

    @abstractmethod
    def _divisors(self, norms: Tensor) -> Tensor:
        """Return numbers that are at least the norms, also after rounding; NaN where no such number exists."""

    @override
    def _raw_factors(self, norms: Tensor) -> Tensor:
        num_groups = norms.shape[0]
        check_groups(num_groups, None if self.per_layer else 1)
        divisors = self._divisors(norms)
        factors = safe_quotients(self.max_grad_norm / math.sqrt(num_groups), divisors)
        return torch.where(divisors >= _SMALLEST_DIVISOR, factors, 0.0)


@dataclass(frozen=True)
class AutomaticClipping(NormalisingClipping):
    """Normalisation of every gradient, in place of clipping only the large ones.

        f = R / (||g_i|| + gamma)      AUTO-S;   gamma = 0 is AUTO-V, where a zero gradient stays zero

    R = 1 is the R-independent form, in which only the noise multiplier matters. Another R is the R-dependent form: with
    (lr, weight decay) it equals R = 1 with (lr R, weight decay / R) under SGD, and with the same lr under Adam.

    **Guarantee**: see ``Clipping``; sensitivity R. Where ||g_i|| + gamma < 1e-15 the contribution is zero: a norm that
    small cannot be computed in float32.

    Args:
        gamma: stability constant, finite and >= 0, compared with ONE sample's gradient (before any division by B).
        max_grad_norm: R, in [1e-30, 1e30].
        per_layer: whether each module is normalised on its own, to R / sqrt(G).

    Raises:
        ValueError: a number out of range.

    Example:
        >>> AutomaticClipping(gamma=0.0).factors(torch.tensor([[0.0, 0.5]])).tolist()
        [[0.0, 1.9999995231628418]]

    References:
        Bu et al. 2023, Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger, NeurIPS,
        section 3.
    """

    name: ClassVar[str] = "automatic"

    @override
    def _divisors(self, norms: Tensor) -> Tensor:
        return norms + self.gamma
