"""Search and replacement of tensors in the arguments of an operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def tensors_in(args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the tensors of arguments, nested in lists, tuples and dictionaries, in a fixed order."""
    for thing in (*args, *kwargs.values()):
        if isinstance(thing, Tensor):
            yield thing
        elif type(thing) in (tuple, list):
            yield from tensors_in(thing, {})
        elif type(thing) is dict:
            yield from tensors_in((), thing)


def replaced(args: Any, kwargs: Any, change: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    """Return the arguments with ``change`` applied to every tensor, in the order of :func:`tensors_in`."""

    def walk(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return change(thing)
        if type(thing) in (tuple, list):
            return type(thing)([walk(one) for one in thing])
        if type(thing) is dict:
            return {key: walk(one) for key, one in thing.items()}
        return thing

    return tuple([walk(thing) for thing in args]), {key: walk(thing) for key, thing in kwargs.items()}


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
