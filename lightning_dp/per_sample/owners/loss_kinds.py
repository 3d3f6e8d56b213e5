"""The operations that make a loss: reductions to a scalar, and what is computed with scalars."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor
from torch.nn import functional as F

_LOSSES = """cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy
    binary_cross_entropy_with_logits poisson_nll_loss gaussian_nll_loss soft_margin_loss hinge_embedding_loss
    cosine_embedding_loss margin_ranking_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss
    triplet_margin_loss"""
_ARITHMETIC = (
    """add sub mul div pow rsub truediv rdiv rtruediv radd rmul rpow neg abs eq ne lt le gt ge and or invert"""
)
_FUNCTIONS = """add sub subtract mul multiply div divide true_divide pow neg abs exp log log1p expm1 sqrt rsqrt square
    reciprocal clamp clamp_min clamp_max maximum minimum nan_to_num float double half bfloat16 to type_as clone detach
    eq ne lt le gt ge isfinite isnan isinf logical_and logical_or logical_not where zeros_like ones_like full_like"""
EXTREMES = {"max": "amax", "min": "amin", "amax": "amax", "amin": "amin"}
"""Reductions to the largest or smallest entry, each with the name of the one along axes."""
_REDUCTIONS = {"sum", "mean", "nansum", "nanmean", "count_nonzero", "any", "all", *EXTREMES}
IN_PLACE = {f"{name}_" for name in ("add", "sub", "mul", "div")}
_SCALARS = {*(f"__{name}__" for name in _ARITHMETIC.split()), *_FUNCTIONS.split(), *IN_PLACE}
BY_VALUES = {"masked_select", "nonzero", "argwhere", "unique", "unique_consecutive"}
_SELECTIONS = {*BY_VALUES, "__getitem__", "index_select", "gather", "take_along_dim"}


@functools.lru_cache(4096)  # asked of every operation of a step
def kind_of(func: Any) -> str | None:
    """Return the kind of an operation that this mode knows; None for all others."""
    name: str = getattr(func, "__name__", "")
    if func in [getattr(F, one) for one in _LOSSES.split()]:
        return "loss"
    if name in _REDUCTIONS:
        return "reduction"
    if name in _SCALARS:
        return "scalar"
    if name in _SELECTIONS:
        return "selection"
    return "stack" if name == "stack" else None


@functools.cache
def defaults_of(func: Any) -> dict[str, Any]:
    """Return the arguments of a function by name, in their order, with the values that they have if not given."""
    return {name: parameter.default for name, parameter in inspect.signature(func).parameters.items()}


def weights_of(options: Any) -> tuple[Tensor, Tensor]:
    """Return what each entry of a loss of labels counts for in its mean, and which ones count."""
    target: Tensor = options["target"]
    counted: Tensor = target != options["ignore_index"]
    weight: Tensor | None = options["weight"]
    return (counted if weight is None else weight[target.masked_fill(~counted, 0)] * counted), counted


def is_over_all_axes(name: str, tensor: Any, others: Any, options: Any) -> bool:
    """Tell whether a reduction of a tensor gives one number, and nothing else.

    Args:
        name: of the reduction.
        tensor: its first argument.
        others: the other ones.
        options: the same, by name.
    """
    named = {key: option for key, option in options.items() if key != "dtype"}
    given = [*others, *named.values()]
    if not isinstance(tensor, Tensor) or not given:
        return isinstance(tensor, Tensor)
    if len(given) > 1 or name in ("max", "min") or not named.keys() <= {"dim", "axis"} or not tensor.dim():
        return False
    axes = [*given[0]] if isinstance(given[0], (tuple, list)) else given
    return all(type(axis) is int for axis in axes) and {axis % tensor.dim() for axis in axes} == {*range(tensor.dim())}
