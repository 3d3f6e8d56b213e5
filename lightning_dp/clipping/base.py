"""The contract of every clipping: factors or contributions that bound one sample, and the sensitivity that follows.

Shapes: G groups of parameters, B samples, P private coordinates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

SMALLEST_FACTOR = torch.finfo(torch.float32).tiny
"""Subnormal factors are too coarse to keep a bound: the sample is dropped."""

# A float32 quotient times a norm may exceed the bound by two roundings of 2^-24; this keeps it below.
SAFE_SIDE = 1 - 2.0**-22


class Clipping(ABC):
    """How one sample's gradient is bounded before it joins the sum.

        u_i = (f_1 g_i1, ..., f_G g_iG),   f = factors(||g_i1||, ..., ||g_iG||),   ||u_i|| <= sensitivity

    Where ``needs_gradients``, u_i is no multiple of g_i: ``contributions`` computes it from the gradient itself.

    **Guarantee**: where ``bounded``, the contribution u_i of any one sample has an L2 norm of at most
    ``sensitivity(G)``, for zero, subnormal, huge, infinite and NaN gradients, given norms accurate to float32; a sample
    with a norm that is not finite in any group contributes exactly zero in all. So adding or removing one sample moves
    the sum by at most ``sensitivity(G)``; replacing one, by twice that. Norms, factors and contributions are private.
    """

    name: ClassVar[str]
    bounded: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False
    """Whether per-sample gradients must be at hand: ``contributions`` is used in place of ``factors``."""

    def groups(self, parameters: Iterable[str]) -> list[list[str]]:
        """Return which parameters share a norm and a factor.

        Args:
            parameters: names of the private parameters (or a mapping with these keys), in the module's order.

        Returns:
            G lists of names that partition the parameters; row g of the norms belongs to list g.
        """
        return [list(parameters)]

    @abstractmethod
    def sensitivity(self, num_groups: int) -> float:
        """Return the largest L2 norm of one sample's contribution over all groups.

        Args:
            num_groups: G >= 1, the number of lists from ``groups``.
        """

    @abstractmethod
    def scaled(self, factor: float) -> Clipping:
        """Return the same clipping with every bound, and so the sensitivity, multiplied by a factor.

        Args:
            factor: finite and > 0. It must be public.

        Raises:
            TypeError: a factor that is not a number.
            ValueError: a factor out of range, or a clipping without a bound that could be moved.
        """

    def for_coordinates(self, num_coordinates: int) -> Clipping:
        """Return the clipping with what depends on the number of private coordinates settled.

        Args:
            num_coordinates: P >= 1.
        """
        return self

    @abstractmethod
    def _raw_factors(self, norms: Tensor) -> Tensor:
        """Return factors for finite norms; what they are for others does not matter."""

    def factors(self, norms: Tensor) -> Tensor:
        """Return the factor of every sample in every group.

        Args:
            norms: (G, B) L2 norms of per-sample gradients, float32 or float64, private.

        Returns:
            (G, B) factors >= 0 of the same type, private; 0 in all groups for a sample with a norm that is not finite.

        Raises:
            TypeError: norms of lower precision, or a clipping that scales by no factor.
            ValueError: norms that are not two-dimensional.
        """
        if norms.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Expected float32 or float64 norms, got dtype={norms.dtype}. Compute norms in float32.")
        if norms.ndim != 2:
            raise ValueError(f"Expected norms of shape (groups, samples), got shape={tuple(norms.shape)}.")
        factors = self._raw_factors(norms)
        # written so that NaN is dropped as well
        usable = ((norms >= 0) & (norms < math.inf)).all(dim=0) & (factors >= SMALLEST_FACTOR) & (factors < math.inf)
        return torch.where(usable, factors, 0.0)

    def contributions(self, grads_BP: Tensor, live: Tensor | None = None) -> Tensor:
        """Return what each sample adds to the sum, where ``needs_gradients``.

        Args:
            grads_BP: (B, P) per-sample gradients, float32 or float64, private.
            live: (P,) booleans, public: only coordinates with True may receive anything. ``None``: all of them.

        Returns:
            (B, P) contributions of the same type, private.

        Raises:
            TypeError: gradients of lower precision, or a clipping that works by factors.
            ValueError: shapes that do not fit.
        """
        raise TypeError(
            f"Expected a clipping that needs gradients, got {type(self).__name__}, which scales each sample by a factor. Use "
            "factors(norms)."
        )

    @property
    def gives_mean(self) -> bool:
        """Whether the gradient is the mean of what samples contribute by factors: then it may be summed up as one from the start."""
        return not self.needs_gradients and type(self).finish is Clipping.finish

    def finish(self, noisy: Tensor, expected_batch_size: int, out: Tensor) -> None:
        """Turn the noisy sum into the gradient: post-processing.

            out = noisy / B

        **Guarantee**: a function of its public arguments alone, so as private as ``noisy``.

        Args:
            noisy: the sum after noise, or the live part of it, any shape.
            expected_batch_size: B >= 1, public.
            out: receives the gradient; same shape and type; may be ``noisy`` itself.
        """
        torch.mul(noisy, 1 / expected_batch_size, out=out)


def clip_factors(norms: Tensor, bound: float) -> Tensor:
    """Return min(1, bound / norm), rounded down."""
    return (bound * SAFE_SIDE / norms).clamp(max=1.0)


def check_bound(name: str, value: float) -> None:
    """Raise ValueError unless bounds, also divided by sqrt(G), are exact numbers of float32's range."""
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"Expected 1e-30 <= {name} <= 1e30, got {name}={value}. Rescale the loss instead.")


def check_groups(num_groups: int, expected: int | None) -> None:
    """Raise ValueError unless the number of groups is the one expected (``None``: any from 1 on)."""
    if num_groups < 1 or (expected is not None and num_groups != expected):
        wanted = "at least 1" if expected is None else str(expected)
        raise ValueError(
            f"Expected {wanted} group(s) of parameters, got num_groups={num_groups}. Take the groups from this clipping's groups()."
        )
