"""Per-sample clipping: factors that bound what one sample adds to the sum, and the sensitivity that follows.

Shapes: G groups of parameters, B samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

_FLOAT32 = torch.finfo(torch.float32)
# A float32 quotient times a norm may exceed the bound by two roundings of 2^-24; this keeps it below.
_SAFE_SIDE = 1 - 2.0**-22
# Squares of coordinates vanish in float32 near here: a smaller norm cannot be trusted as a divisor.
_SMALLEST_DIVISOR = 1e-15


class Clipping(ABC):
    """How one sample's gradient is scaled before it joins the sum.

        u_i = (f_1 g_i1, ..., f_G g_iG),   f = factors(||g_i1||, ..., ||g_iG||),   ||u_i|| <= sensitivity

    **Guarantee**: where ``bounded``, the contribution u_i of any one sample has an L2 norm of at most
    ``sensitivity(G)``, for zero, subnormal, huge, infinite and NaN gradients, given norms accurate to float32; a sample
    with a norm that is not finite in any group contributes exactly zero in all. So adding or removing one sample moves
    the sum by at most ``sensitivity(G)``; replacing one, by twice that. Norms and factors are private.
    """

    name: ClassVar[str]
    bounded: ClassVar[bool] = True

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
    def _raw_factors(self, norms: Tensor) -> Tensor:
        """Return factors for finite norms; what they are for others does not matter."""

    def factors(self, norms: Tensor) -> Tensor:
        """Return the factor of every sample in every group.

        Args:
            norms: (G, B) L2 norms of per-sample gradients, float32 or float64, private.

        Returns:
            (G, B) factors >= 0 of the same type, private; 0 in all groups for a sample with a norm that is not finite.

        Raises:
            TypeError: norms of lower precision.
            ValueError: norms that are not two-dimensional.
        """
        if norms.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Expected float32 or float64 norms, got dtype={norms.dtype}. Compute norms in float32.")
        if norms.ndim != 2:
            raise ValueError(f"Expected norms of shape (groups, samples), got shape={tuple(norms.shape)}.")
        factors = self._raw_factors(norms)
        # A subnormal factor is too coarse to keep the bound; written so that NaN is dropped as well.
        usable = ((norms >= 0) & (norms < math.inf)).all(dim=0) & (factors >= _FLOAT32.tiny) & (factors < math.inf)
        return torch.where(usable, factors, 0.0)


@dataclass(frozen=True)
class FlatClipping(Clipping):
    """Clip the norm of the whole gradient.

        f = min(1, R / ||g_i||)

    **Guarantee**: see ``Clipping``; sensitivity R.

    Args:
        max_grad_norm: R, the bound, finite and > 0.

    Raises:
        ValueError: a bound out of range.

    Example:
        >>> FlatClipping(2.0).factors(torch.tensor([[1.0, 4.0, torch.nan]])).tolist()
        [[1.0, 0.49999988079071045, 0.0]]

    References:
        Abadi et al. 2016, Deep Learning with Differential Privacy, algorithm 1.
    """

    max_grad_norm: float = 1.0
    name: ClassVar[str] = "flat"

    def __post_init__(self) -> None:
        _check_bound("max_grad_norm", self.max_grad_norm)

    @override
    def sensitivity(self, num_groups: int) -> float:
        _check_groups(num_groups, 1)
        return self.max_grad_norm

    @override
    def _raw_factors(self, norms: Tensor) -> Tensor:
        _check_groups(norms.shape[0], 1)
        return _clip(norms, self.max_grad_norm)


@dataclass(frozen=True)
class PerLayerClipping(Clipping):
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
        _check_bound("max_grad_norm", self.max_grad_norm)
        if self.max_grad_norms is None:
            return
        # Copied, so that a caller's later change cannot move the bound below the noise.
        if isinstance(self.max_grad_norms, Mapping):
            object.__setattr__(self, "max_grad_norms", dict(self.max_grad_norms))
        else:
            object.__setattr__(self, "max_grad_norms", tuple(self.max_grad_norms))
        for index, bound in enumerate(self._given_bounds()):
            _check_bound(f"max_grad_norms[{index}]", bound)

    @override
    def groups(self, parameters: Iterable[str]) -> list[list[str]]:
        owned: dict[str, list[str]] = {}
        for parameter in parameters:
            owned.setdefault(parameter.rpartition(".")[0], []).append(parameter)
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
            _check_groups(num_groups, None)
            return self.max_grad_norm
        _check_groups(num_groups, len(self.max_grad_norms))
        return math.hypot(*self._given_bounds())

    @override
    def _raw_factors(self, norms: Tensor) -> Tensor:
        num_groups = norms.shape[0]
        if self.max_grad_norms is None:
            return _clip(norms, self.max_grad_norm / math.sqrt(num_groups))
        _check_groups(num_groups, len(self.max_grad_norms))
        bounds = self._given_bounds()
        return torch.stack([_clip(row, bound) for row, bound in zip(norms, bounds, strict=True)])

    def _given_bounds(self) -> list[float]:
        assert self.max_grad_norms is not None
        given = self.max_grad_norms
        return list(given.values() if isinstance(given, Mapping) else given)


@dataclass(frozen=True)
class AutomaticClipping(Clipping):
    """Normalise every gradient instead of clipping the large ones.

        f = R / (||g_i|| + gamma)      AUTO-S;   gamma = 0 is AUTO-V, where a zero gradient stays zero

    R = 1 is the R-independent form: the noise multiplier alone decides. Another R is the R-dependent form, the same as
    R = 1 with a learning rate of lr R and a weight decay of wd / R under SGD.

    **Guarantee**: see ``Clipping``; sensitivity R. Where ||g_i|| + gamma < 1e-15 the contribution is zero: a norm that
    small cannot be computed in float32.

    Args:
        gamma: stability constant, finite and >= 0, compared with ONE sample's gradient (never after a 1 / B).
        max_grad_norm: R, finite and > 0.
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

    gamma: float = 0.01
    max_grad_norm: float = 1.0
    per_layer: bool = False
    name: ClassVar[str] = "automatic"

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"Expected 0 <= gamma < inf, got gamma={self.gamma}.")
        _check_bound("max_grad_norm", self.max_grad_norm)

    @override
    def groups(self, parameters: Iterable[str]) -> list[list[str]]:
        return PerLayerClipping().groups(parameters) if self.per_layer else super().groups(parameters)

    @override
    def sensitivity(self, num_groups: int) -> float:
        _check_groups(num_groups, None if self.per_layer else 1)
        return self.max_grad_norm

    @override
    def _raw_factors(self, norms: Tensor) -> Tensor:
        num_groups = norms.shape[0]
        _check_groups(num_groups, None if self.per_layer else 1)
        divisors = norms + self.gamma
        factors = self.max_grad_norm / math.sqrt(num_groups) * _SAFE_SIDE / divisors
        return torch.where(divisors >= _SMALLEST_DIVISOR, factors, 0.0)


@dataclass(frozen=True)
class NoClipping(Clipping):
    """Leave finite gradients as they are: for ablations only.

        f = 1

    **Guarantee**: none: one sample's contribution has no bound and epsilon is infinite, with noise or without.
    ``sensitivity`` is the nominal scale that the noise of an ablation refers to, not a bound. A sample with a norm that
    is not finite still contributes zero.

    Args:
        max_grad_norm: the nominal scale, finite and > 0.

    Example:
        >>> NoClipping().factors(torch.tensor([[1e6, torch.inf]])).tolist()
        [[1.0, 0.0]]
    """

    max_grad_norm: float = 1.0
    name: ClassVar[str] = "none"
    bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_bound("max_grad_norm", self.max_grad_norm)

    @override
    def sensitivity(self, num_groups: int) -> float:
        _check_groups(num_groups, None)
        return self.max_grad_norm

    @override
    def _raw_factors(self, norms: Tensor) -> Tensor:
        return torch.ones_like(norms)


def make_clipping(spec: str | Clipping, max_grad_norm: float) -> Clipping:
    """Return the clipping that a name stands for; a ``Clipping`` is returned as it is.

    Args:
        spec: "flat", "per_layer", "automatic", "none", or an object.
        max_grad_norm: R for "flat" and "per_layer", the nominal scale for "none". "automatic" is the R-independent form
            and does not use it; give ``AutomaticClipping(max_grad_norm=...)`` for the R-dependent one.

    Returns:
        The clipping.

    Raises:
        TypeError: neither a name nor a ``Clipping``.
        ValueError: an unknown name, or a bound out of range.

    Example:
        >>> make_clipping("per_layer", 0.5)
        PerLayerClipping(max_grad_norm=0.5, max_grad_norms=None)
    """
    if isinstance(spec, Clipping):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"Expected the name of a clipping or a Clipping, got {type(spec).__name__}.")
    _check_bound("max_grad_norm", max_grad_norm)
    makers: dict[str, Callable[[], Clipping]] = {
        "flat": lambda: FlatClipping(max_grad_norm),
        "per_layer": lambda: PerLayerClipping(max_grad_norm),
        "automatic": AutomaticClipping,
        "none": lambda: NoClipping(max_grad_norm),
    }
    if spec not in makers:
        raise ValueError(f"Expected clipping to be one of {list(makers)}, got clipping={spec!r}.")
    return makers[spec]()


def _clip(norms: Tensor, bound: float) -> Tensor:
    return (bound * _SAFE_SIDE / norms).clamp(max=1.0)


def _check_bound(name: str, value: float) -> None:
    if not 1e-30 <= value <= 1e30:  # so that bounds, also divided by sqrt(G), are exact numbers of float32's range
        raise ValueError(f"Expected 1e-30 <= {name} <= 1e30, got {name}={value}.")


def _check_groups(num_groups: int, expected: int | None) -> None:
    if num_groups < 1 or (expected is not None and num_groups != expected):
        wanted = "at least 1" if expected is None else str(expected)
        raise ValueError(f"Expected {wanted} group(s) of parameters, got num_groups={num_groups}.")
