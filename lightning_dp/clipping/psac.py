"""Normalisation that amplifies small gradients less than AUTO-S does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_dp.clipping.automatic import NormalisingClipping


@dataclass(frozen=True)
class PSACClipping(NormalisingClipping):
    """Per-sample adaptive clipping: a normalisation whose weight is not monotonic in the norm.

        f = R / (||g_i|| + gamma / (||g_i|| + gamma))

    The factor is R for a zero gradient (AUTO-S: R / gamma), largest at ||g_i|| = sqrt(gamma) - gamma, with the value
    R / (2 sqrt(gamma) - gamma), and about R / ||g_i|| for large gradients. So a sample that is nearly fitted has little
    influence, whereas AUTO-S gives it almost as much as the others.

    **Guarantee**: see ``Clipping``; sensitivity R. gamma = 0 is AUTO-V. Where the divisor is below 1e-15 the
    contribution is zero: a norm that small cannot be computed in float32.

    Args:
        gamma: stability constant, finite and >= 0, compared with ONE sample's gradient (before any division by B);
            the formula is meant for values below 1.
        max_grad_norm: R, in [1e-30, 1e30].
        per_layer: whether each module is normalised on its own, to R / sqrt(G).

    Raises:
        ValueError: a number out of range.

    Example:
        >>> import torch
        >>> factors = PSACClipping(gamma=0.01).factors(torch.tensor([[0.0, 0.09, 100.0]]))
        >>> [round(factor, 4) for factor in factors[0].tolist()]
        [1.0, 5.2632, 0.01]

    References:
        Xia et al. 2023, Differentially Private Learning with Per-Sample Adaptive Clipping, AAAI.
    """

    name: ClassVar[str] = "psac"

    @override
    def _divisors(self, norms: Tensor) -> Tensor:
        return norms + self.gamma / (norms + self.gamma)
