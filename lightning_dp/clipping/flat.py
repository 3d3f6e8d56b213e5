"""One bound on the norm of the whole gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.clipping.base import FactorClipping, check_bound, check_groups, clip_factors


@dataclass(frozen=True)
class FlatClipping(FactorClipping):
    """Clipping of the norm of the whole gradient.

        f = min(1, R / ||g_i||)

    **Guarantee**: see ``Clipping``; sensitivity R.

    Args:
        max_grad_norm: R, the bound, in [1e-30, 1e30].

    Raises:
        ValueError: a bound out of range.

    Example:
        >>> import torch
        >>> FlatClipping(2.0).factors(torch.tensor([[1.0, 4.0, torch.nan]])).tolist()
        [[1.0, 0.49999988079071045, 0.0]]

    References:
        Abadi et al. 2016, Deep Learning with Differential Privacy, algorithm 1.
    """

    max_grad_norm: float = 1.0
    name: ClassVar[str] = "flat"

    def __post_init__(self) -> None:
        check_bound("max_grad_norm", self.max_grad_norm)

    @override
    def sensitivity(self, num_groups: int) -> float:
        check_groups(num_groups, 1)
        return self.max_grad_norm

    @override
    def scaled(self, factor: float) -> FlatClipping:
        return replace(self, max_grad_norm=self.max_grad_norm * check.check_positive("factor", factor))

    @override
    def _raw_factors(self, norms: Tensor) -> Tensor:
        check_groups(norms.shape[0], 1)
        return clip_factors(norms, self.max_grad_norm)
