"""Properties of torch functions that are known before they run, for the owners of their results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dp.per_sample.owners.axes import AXES, JOINS, REDUCING, AxisAfter
from lightning_dp.per_sample.owners.moves import CONSTANTS, handler_of, has_index
from lightning_dp.per_sample.owners.owned import Mixed
from lightning_dp.per_sample.owners.quick import Quick, aligned, along, by_index, constant, joined, unknown
from lightning_dp.per_sample.owners.reductions import Found, Step, entry_by_entry, where
from lightning_dp.per_sample.tracking.operations import IN_PLACE

_METHODS = """size dim ndimension numel nelement stride storage_offset data_ptr element_size is_contiguous get_device
    is_floating_point is_complex is_inference __len__"""
_ATTRIBUTES = """shape ndim dtype device layout requires_grad is_leaf is_sparse is_cuda is_mps is_quantized is_meta
    _version is_nested"""
SHOWS_NO_ENTRY = {
    *(getattr(Tensor, name) for name in _METHODS.split()),
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    torch.is_floating_point,
    torch.numel,
}
"""Functions that return no tensor and no entry of one: half of all calls of a graph network."""


class Traits(NamedTuple):
    """Properties of a torch function that are known before it runs.

    Args:
        func: the function.
        name: name of the operation, or of the attribute that is read.
        handler: computes the owners of its result; None if nothing does.
        is_entered: whether it is a function of ``torch.nn.functional`` that only its operations say something about.
        in_place: whether it may change its first argument.
        joins: whether it puts tensors together along one of their axes, or a new one.
        reduces: whether it computes over some axes, and mixes the rows along these.
        axis_after: finds the axis of the owners in its result.
        is_constant: whether its result holds no data.
        of_first: whether its result has the entries of its first argument alone.
        quick: returns the owners of its result if they follow from few facts.
        mixed: the owners of its result if it mixes samples.
    """

    func: Any
    name: str
    handler: Callable[[Step], Found] | None
    is_entered: bool
    in_place: bool
    joins: bool
    reduces: bool
    axis_after: AxisAfter | None
    is_constant: bool
    of_first: bool
    quick: Quick
    mixed: Mixed

    @property
    def is_aligned(self) -> bool:
        """True if its result is computed entry by entry from arguments that broadcast."""
        return self.quick is aligned


_READ_FIRST = "expand_as view_as reshape_as to type_as expand view reshape repeat narrow as_strided"
_OF_FIRST = frozenset(_READ_FIRST.split())
"""Operations that read the entries of their first tensor alone; others give a shape, a size or a type."""


@functools.cache
def traits_of(func: Any) -> Traits:
    """Return the properties of a torch function."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        name = func.__self__.__name__
    handler, axis_after, is_constant = handler_of(name), AXES.get(name), name in CONSTANTS
    is_functional = isinstance(func, FunctionType) and func.__module__ == "torch.nn.functional"
    return Traits(
        func,
        name,
        handler,
        is_functional and handler is None and axis_after is None,
        bool(IN_PLACE.fullmatch(name)),
        name in JOINS or name == "stack",
        name in REDUCING and name not in ("sort", "argsort", "cumsum"),
        axis_after,
        is_constant,
        name in _OF_FIRST,
        _quick(name, handler, axis_after, is_constant=is_constant),
        Mixed(name),
    )


def _quick(
    name: str, handler: Callable[[Step], Found] | None, axis_after: AxisAfter | None, *, is_constant: bool
) -> Quick:
    """Return the function that decides the common cases."""
    if is_constant:
        return constant
    if has_index(name):
        return by_index
    if name in JOINS:
        return joined
    if handler is None and axis_after is None:
        return unknown
    return aligned if handler in (entry_by_entry, where) else along
