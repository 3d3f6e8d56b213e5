"""Search and replacement of tensors in the arguments of an operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample.tracking.nodes import Reporting

NO_TENSORS = frozenset((int, float, bool, str, type(None), slice, type(Ellipsis), torch.Size, torch.dtype))
"""Common types of arguments that hold no tensors."""

_CONTAINERS = frozenset((tuple, list, dict))
_FIRST = ("input", "a", "mat1", "other", "mat2", "vec", "b")
"""Names that torch gives to the first arguments of operations, in their order."""
_ALONE = ("input", "tensors")
"""Names of the first argument of operations."""
_NOT_FIRST = frozenset(("where", "searchsorted", "polygamma", "special_polygamma"))
"""Operations whose ``input`` is not their first argument."""


def tensors_in(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors of arguments, nested in lists, tuples and dictionaries, in a fixed order."""
    found: list[Any] = []
    for thing in args if not kwargs else (*args, *kwargs.values()):
        kind = type(thing)
        if kind is Tensor:
            found.append(thing)
        elif kind in NO_TENSORS:
            continue
        elif isinstance(thing, Reporting):  # of other kinds of tensors this is slow to tell
            found.append(thing)
        elif kind is tuple or kind is list:
            found += tensors_in(thing, None)
        elif kind is dict:
            found += tensors_in((), thing)
        elif isinstance(thing, Tensor):
            found.append(thing)
    return found


def replaced(args: Any, kwargs: Any, change: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    """Return the arguments with ``change`` applied to every tensor, in the order of :func:`tensors_in`."""

    def one_of(thing: Any) -> Any:
        return change(thing) if type(thing) not in NO_TENSORS and isinstance(thing, Tensor) else thing

    return _mapped(args, kwargs, one_of)


def exchanged(args: Any, kwargs: Any, own: Mapping[int, Any]) -> tuple[Any, Any]:
    """Return the arguments with some tensors, given by their identity, replaced by others."""
    if not kwargs and _CONTAINERS.isdisjoint(map(type, args)):
        return tuple([own.get(id(thing), thing) for thing in args]), {}
    return _mapped(args, kwargs, lambda thing: own.get(id(thing), thing))


def _mapped(args: Any, kwargs: Any, change: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Return the arguments with ``change`` applied to everything in them that is no list, tuple or dictionary."""
    return tuple([_walked(thing, change) for thing in args]), _walked(kwargs, change) if kwargs else {}


def _walked(thing: Any, change: Callable[[Any], Any]) -> Any:
    kind = type(thing)
    if kind is tuple or kind is list:
        return kind([_walked(one, change) for one in thing])
    if kind is dict:
        return {key: _walked(one, change) for key, one in thing.items()}
    return change(thing)


def with_other_values(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor; of numbers with a fraction, one with a different value in every entry.

    Two ways to compute an operation may agree by accident where a tensor holds zeros or equal numbers, as it often does
    before the first step.

    Example:
        >>> with_other_values(torch.zeros(3))
        tensor([0.5000, 1.0000, 1.5000])
    """
    copied = tensor.detach().clone().as_subclass(Tensor)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return copied
    steps = torch.linspace(0.5, 1.5, tensor.numel(), device=tensor.device)
    return copied + steps.reshape(tensor.shape).to(tensor.dtype)


def first_by_position(func: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an operation of torch that got all of them by keyword, the first one by position.

    Example:
        >>> first_by_position(torch.sum, {"dim": 1, "input": 3})
        ((3,), {'dim': 1})
        >>> first_by_position(torch.where, {"condition": 1, "input": 3})
        ((), {'condition': 1, 'input': 3})
    """
    first = next((one for one in _ALONE if one in kwargs), None)
    is_known = isinstance(func, BuiltinFunctionType) or getattr(func, "__module__", "") == "torch.nn.functional"
    if first is None or not is_known or func.__name__ in _NOT_FIRST:
        return (), kwargs
    return (kwargs[first],), {key: one for key, one in kwargs.items() if key != first}


def by_position(function: Callable[..., Any], tracker: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of a handler of an operation, which gets the first arguments by position.

    Args:
        function: the handler.
        tracker: follows the parameters.
        func: the operation.
        args: its arguments.
        kwargs: its keyword arguments, as in ``torch.matmul(input=x, other=weight)``.
    """
    named = [kwargs[name] for name in _FIRST if name in kwargs]
    return function(tracker, func, *args, *named, **{name: kwargs[name] for name in kwargs if name not in _FIRST})
