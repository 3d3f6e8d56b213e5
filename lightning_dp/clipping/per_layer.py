"""One clipping bound for each module with parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.clipping.base import FactorClipping, check_bound, check_groups, clip_factors


@dataclass(frozen=True)
class PerLayerClipping(FactorClipping):
    """Separate clipping of the gradient of each module, or of each group of parameters.

        f_l = min(1, R_l / ||g_il||);   R_l = R / sqrt(G) unless given

    One group is one module that owns parameters (all names equal up to the last dot), or the parameters that match one
    pattern of ``group_weights``. Groups may have noise of different stds. With d_l active coordinates, any stds sigma_l
    with ``sum_l (R_l / sigma_l)^2 <= sigma^-2`` give one Gaussian mechanism of multiplier sigma. There are two choices:

        noise="least":  sigma_l^2 = sigma^2 (R_l / sqrt(d_l)) sum_j R_j sqrt(d_j)
                        total     = sigma^2 (sum_l R_l sqrt(d_l))^2
        noise="equal":  sigma_l^2 = sigma^2 sum_j R_j^2
                        total     = sigma^2 (sum_l R_l^2) (sum_l d_l)

    "least" is the default: in 12 comparisons at equal epsilon it was better in 6 and worse in none
    (benchmarks/units_and_noise.md).

    **Guarantee**: see ``Clipping``; sensitivity sqrt(sum_l R_l^2), which is R for the default bounds.

    Args:
        max_grad_norm: R, the bound over all groups, in [1e-30, 1e30]; not used if ``max_grad_norms`` is given.
        max_grad_norms: the bounds R_l: one per group in the order of ``groups``, or a mapping from module name (the
            parameters' name up to the last dot, "" for the root) to bound. ``None``: R / sqrt(G) each.
        noise: "least", the smallest total noise with the same privacy, less on large groups and more on small ones; or
            "equal", the same std on every coordinate, which correlated noise and canaries in gradient space need.
        group_weights: mapping from patterns of parameter names ("encoder.*") to relative bounds w_l, for groups by
            pattern: ``R_l = R w_l / sqrt(sum_j w_j^2)``. A parameter belongs to the first pattern that matches.

    Raises:
        ValueError: a bound out of range; bounds that do not match the groups; a parameter without a group.

    Example:
        >>> clipping = PerLayerClipping(1.0)
        >>> clipping.groups(["conv.weight", "conv.bias", "head.weight"])
        [['conv.weight', 'conv.bias'], ['head.weight']]
        >>> PerLayerClipping(max_grad_norms=(3.0, 4.0)).sensitivity(2)
        5.0
        >>> [round(share, 2) for share in PerLayerClipping().noise_shares([10_000, 100])]
        [0.74, 2.35]

    References:
        McMahan et al. 2018, A General Approach to Adding Differential Privacy to Iterative Training Procedures,
        section 3.
    """

    max_grad_norm: float = 1.0
    max_grad_norms: Sequence[float] | Mapping[str, float] | None = None
    noise: Literal["equal", "least"] = "least"
    group_weights: Mapping[str, float] | None = None
    name: ClassVar[str] = "per_layer"

    def __post_init__(self) -> None:
        check_bound("max_grad_norm", self.max_grad_norm)
        check.check_choice("noise", self.noise, ("equal", "least"))
        if self.group_weights is not None:
            if self.max_grad_norms is not None or not self.group_weights:
                raise ValueError(
                    "Expected patterns with weights in group_weights and no max_grad_norms, got "
                    f"group_weights={self.group_weights!r} and max_grad_norms={self.max_grad_norms!r}. Give bounds in "
                    "one way."
                )
            object.__setattr__(
                self, "group_weights", {key: check.check_positive(key, w) for key, w in self.group_weights.items()}
            )
        if self.max_grad_norms is None:
            return
        # Copied, so that a caller's later change cannot move the bound below the noise.
        if isinstance(self.max_grad_norms, Mapping):
            object.__setattr__(self, "max_grad_norms", dict(self.max_grad_norms))
        else:
            object.__setattr__(self, "max_grad_norms", tuple(self.max_grad_norms))
        for index, bound in enumerate(self._bounds(len(self.max_grad_norms))):
            check_bound(f"max_grad_norms[{index}]", bound)

    @override
    def groups(self, parameters: Iterable[str]) -> list[list[str]]:
        if self.group_weights is not None:
            return by_pattern(parameters, self.group_weights)
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
        bounds = self._bounds(num_groups)
        return self.max_grad_norm if self.max_grad_norms is None else math.hypot(*bounds)

    @property
    @override
    def shares_noise(self) -> bool:
        return self.noise == "least"

    @override
    def noise_shares(self, sizes: Sequence[int]) -> tuple[float, ...]:
        if self.noise == "equal":
            return ()
        bounds = self._bounds(len(sizes))
        weighted = sum(bound * math.sqrt(size) for bound, size in zip(bounds, sizes, strict=True))
        sensitivity = self.sensitivity(len(sizes))
        # a group without active coordinates adds nothing and needs no noise
        return tuple(
            math.sqrt(bound / math.sqrt(size) * weighted) / sensitivity if size else 0.0
            for bound, size in zip(bounds, sizes, strict=True)
        )

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
        bounds = self._bounds(norms.shape[0])
        if len(set(bounds)) == 1:
            return clip_factors(norms, bounds[0])
        return torch.stack([clip_factors(row, bound) for row, bound in zip(norms, bounds, strict=True)])

    def _bounds(self, num_groups: int) -> list[float]:
        """Return the bounds R_1, ..., R_G of the groups."""
        if self.group_weights is not None:
            check_groups(num_groups, len(self.group_weights))
            total = math.hypot(*self.group_weights.values())
            return [self.max_grad_norm * weight / total for weight in self.group_weights.values()]
        if self.max_grad_norms is None:
            check_groups(num_groups, None)
            return [self.max_grad_norm / math.sqrt(num_groups)] * num_groups
        check_groups(num_groups, len(self.max_grad_norms))
        given = self.max_grad_norms
        return list(given.values() if isinstance(given, Mapping) else given)


def by_module(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Group parameter names by module: the names in a group are equal up to their last dot."""
    owned: dict[str, list[str]] = {}
    for parameter in parameters:
        owned.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return owned


def by_pattern(parameters: Iterable[str], patterns: Iterable[str]) -> list[list[str]]:
    """Group parameter names by the first pattern that matches them.

    Args:
        parameters: names.
        patterns: with ``*`` and ``?`` as in file names.

    Raises:
        ValueError: a parameter without a pattern, or a pattern without a parameter.

    Example:
        >>> by_pattern(["encoder.0.weight", "head.bias"], ["encoder.*", "*"])
        [['encoder.0.weight'], ['head.bias']]
    """
    groups: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    for parameter in parameters:
        matching = [pattern for pattern in groups if fnmatchcase(parameter, pattern)]
        if not matching:
            raise ValueError(
                f"Expected a pattern of group_weights for every trainable parameter, got none for {parameter!r}. Add "
                "'*' for the rest."
            )
        groups[matching[0]].append(parameter)
    empty = [pattern for pattern, group in groups.items() if not group]
    if empty:
        raise ValueError(
            f"Expected a trainable parameter for every pattern of group_weights, got none for {empty[0]!r}. Drop it."
        )
    return list(groups.values())
