"""The contract of every clipping: factors or contributions that bound one sample, and the resulting sensitivity.

Shapes: G groups of parameters, B samples, P private coordinates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.clipping.contribution import Contribution, ExplicitContribution, Samples, WeightedContribution

SMALLEST_FACTOR = torch.finfo(torch.float32).tiny
"""Smallest factor in use: smaller, subnormal factors are too coarse to keep a bound, so they become 0."""

# A float32 quotient times a norm may exceed the bound by two roundings of 2^-24; this keeps it below.
SAFE_SIDE = 1 - 2.0**-22


class Clipping(ABC):
    """The bound on one sample's gradient before it joins the sum.

    There are two kinds: ``FactorClipping`` scales each gradient, ``ExplicitClipping`` computes a vector from it.

    **Guarantee**: if ``bounded``, the contribution u_i of any one sample has an L2 norm of at most
    ``sensitivity(G)``, for zero, subnormal, huge, infinite and NaN gradients, given norms accurate to float32; a sample
    with a norm that is not finite in any group contributes exactly zero in all. So adding or removing one sample moves
    the sum by at most ``sensitivity(G)``; replacing one, by twice that. Norms, factors and contributions are private.
    """

    name: ClassVar[str]
    bounded: ClassVar[bool] = True

    def groups(self, parameters: Iterable[str]) -> list[list[str]]:
        """Return the groups of parameters that share a norm and a factor.

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
        """Return the clipping with settings that are resolved for a number of private coordinates.

        Args:
            num_coordinates: P >= 1.
        """
        return self

    @property
    def shares_noise(self) -> bool:
        """True if each group has noise with its own std; see ``noise_shares``."""
        return False

    def noise_shares(self, sizes: Sequence[int]) -> tuple[float, ...]:
        """Return the std of the noise in each group, in units of ``sigma * sensitivity``.

        Args:
            sizes: active coordinates of each group.

        Returns:
            One factor per group; empty if the std is the same everywhere, which is the default.
        """
        return ()

    @abstractmethod
    def contribution(self, samples: Samples) -> Contribution:
        """Return the contribution of a microbatch's samples; ``Contribution.add`` adds it to the sum.

        Args:
            samples: gradients and norms of the samples, computed only when read.
        """

    @abstractmethod
    def check_scales(self, owner: str, advice: str) -> None:
        """Raise ValueError unless the factors of each sample depend on norms alone.

        Args:
            owner: feature that needs the factors, for the message.
            advice: reason and remedy for the message; a whole sentence.
        """

    @property
    @abstractmethod
    def gives_mean(self) -> bool:
        """True if the gradient is the mean of the contributions, so that the sum may be divided from the start."""

    def finish(self, noisy: Tensor, expected_batch_size: int, out: Tensor) -> None:
        """Turn the noisy sum into the gradient, which is post-processing.

            out = noisy / B

        **Guarantee**: the gradient is a function of the arguments alone, so it is as private as ``noisy``.

        Args:
            noisy: the sum after noise, or its active coordinates, any shape.
            expected_batch_size: B >= 1, public.
            out: tensor that receives the gradient, of the same shape and type; may be ``noisy`` itself.
        """
        torch.mul(noisy, 1 / expected_batch_size, out=out)


class FactorClipping(Clipping):
    """A clipping that scales the gradient of each sample by one factor per group.

        u_i = (f_1 g_i1, ..., f_G g_iG),   f = factors(||g_i1||, ..., ||g_iG||),   ||u_i|| <= sensitivity

    **Guarantee**: see ``Clipping``.
    """

    @abstractmethod
    def _raw_factors(self, norms: Tensor) -> Tensor:
        """Return factors for finite norms; the values for other norms are ignored."""

    def factors(self, norms: Tensor) -> Tensor:
        """Return the factor of every sample in every group.

        Args:
            norms: (G, B) L2 norms of per-sample gradients, float32 or float64, private.

        Returns:
            (G, B) factors >= 0 of the same type, private; 0 in all groups if any norm of the sample is not finite.

        Raises:
            TypeError: norms of lower precision.
            ValueError: norms that are not two-dimensional.
        """
        if norms.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Expected float32 or float64 norms, got dtype={norms.dtype}. Compute norms in float32.")
        if norms.ndim != 2:
            raise ValueError(
                f"Expected norms of shape (groups, samples), got shape={tuple(norms.shape)}. Add an axis of one group."
            )
        factors = self._raw_factors(norms)
        finite = _are_finite(norms, 0.0)
        usable = (finite if len(norms) == 1 else finite.all(dim=0)) & _are_finite(factors, SMALLEST_FACTOR)
        return torch.where(usable, factors, 0.0)

    @override
    def contribution(self, samples: Samples) -> Contribution:
        return WeightedContribution(samples, self.factors(samples.norms))

    @override
    def check_scales(self, owner: str, advice: str) -> None:
        return

    @property
    @override
    def gives_mean(self) -> bool:
        return type(self).finish is Clipping.finish


class ExplicitClipping(Clipping):
    """A clipping that computes an explicit contribution from each sample's gradient.

        u_i = contributions(g_i),   ||u_i|| <= sensitivity

    **Guarantee**: see ``Clipping``.
    """

    @abstractmethod
    def contributions(self, grads_BP: Tensor, active: Tensor | None = None) -> Tensor:
        """Return the contribution of each sample to the sum.

        Args:
            grads_BP: (B, P) per-sample gradients, float32 or float64, private.
            active: (P,) booleans, public: coordinates with False get 0. ``None``: all coordinates are active.

        Returns:
            (B, P) contributions of the same type, private.

        Raises:
            TypeError: gradients of lower precision.
            ValueError: shapes that do not fit.
        """

    @override
    def contribution(self, samples: Samples) -> Contribution:
        return ExplicitContribution(samples, self.contributions(samples.gradients, samples.active))

    @override
    def check_scales(self, owner: str, advice: str) -> None:
        raise ValueError(f"Expected a clipping by a factor with {owner}, got {self.name!r}. {advice}")

    @property
    @override
    def gives_mean(self) -> bool:
        return False


def _are_finite(values: Tensor, least: float) -> Tensor:
    """Tell which values are finite and at least ``least``; NaN is not, because it differs from itself."""
    return values.clamp(least, torch.finfo(values.dtype).max) == values


def clip_factors(norms: Tensor, bound: float) -> Tensor:
    """Return min(1, bound / norm), rounded down."""
    return safe_quotients(bound, norms).clamp(max=1.0)


def safe_quotients(bound: float, norms: Tensor) -> Tensor:
    """Return bound / norm, rounded down. A number by a tensor would be a product with reciprocals, which are subnormal
    and coarse for norms above 8e37.
    """
    return norms.new_full((), bound * SAFE_SIDE) / norms


def check_bound(name: str, value: float) -> None:
    """Raise ValueError unless ``1e-30 <= value <= 1e30``, so that float32 also holds the bound divided by sqrt(G)."""
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"Expected 1e-30 <= {name} <= 1e30, got {name}={value}. Rescale the loss instead.")


def check_groups(num_groups: int, expected: int | None) -> None:
    """Raise ValueError unless the number of groups is as expected (``None``: any number from 1 on)."""
    if num_groups < 1 or (expected is not None and num_groups != expected):
        wanted = "at least 1" if expected is None else str(expected)
        raise ValueError(
            f"Expected {wanted} group(s) of parameters, got num_groups={num_groups}. Take the groups from this "
            "clipping's groups()."
        )
