"""No clipping, for ablations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.clipping.base import FactorClipping, check_bound, check_groups


@dataclass(frozen=True)
class NoClipping(FactorClipping):
    """A clipping that leaves finite gradients unchanged, for ablations only.

        f = 1

    **Guarantee**: none. One sample's contribution has no bound, so epsilon is infinite, with noise or without.
    ``sensitivity`` is not a bound but the nominal scale of the noise in an ablation. A sample with a norm that
    is not finite still contributes zero.

    Args:
        max_grad_norm: the nominal scale, in [1e-30, 1e30].

    Raises:
        ValueError: a scale out of range.

    Example:
        >>> NoClipping().factors(torch.tensor([[1e6, torch.inf]])).tolist()
        [[1.0, 0.0]]
    """

    max_grad_norm: float = 1.0
    name: ClassVar[str] = "none"
    bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bound("max_grad_norm", self.max_grad_norm)

    @override
    def sensitivity(self, num_groups: int) -> float:
        check_groups(num_groups, None)
        return self.max_grad_norm

    @override
    def scaled(self, factor: float) -> NoClipping:
        return replace(self, max_grad_norm=self.max_grad_norm * check.check_positive("factor", factor))

    @override
    def _raw_factors(self, norms: Tensor) -> Tensor:
        return torch.ones_like(norms)
