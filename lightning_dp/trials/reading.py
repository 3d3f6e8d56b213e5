"""Reading check: an item of the dataset depends neither on the items read before it nor on those read with it."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling.fetch import read, reads_many
from lightning_dp.sampling.randomness import fresh_randomness
from lightning_dp.sandbox.kept_tensors import same_values
from lightning_dp.sandbox.object_kinds import GENERATORS
from lightning_dp.sandbox.randomness import generator_restorer, host_generators

#: Random streams under which items are read: what a coin mixes now and then is tried.
NUM_STREAMS = 8
#: Depth, and entries of a container, to which the objects of a dataset are followed; elements of tensors compared.
_DEEPEST, _LONGEST, _LARGEST = 5, 64, 2**20
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def check_reading(dataset: Any, positions: list[int], *, streams: int = NUM_STREAMS) -> None:
    """Check that items are the same whatever else is read.

    Args:
        dataset: with random access.
        positions: three different positions; fewer if the dataset is smaller.
        streams: number of random streams under which they are read.

    Raises:
        PrivacyError: an item changes with another one: by memory that items share, by state of the dataset (a running
            mean, the last item), or within ``__getitems__``.
    """
    if len(positions) < 2:
        return
    first, second, third = (positions * 2)[:3]
    for stream in range(streams):
        once = content_of(read_under(dataset, [first], stream)[0], dataset)
        item = read_under(dataset, [first], stream)[0]
        state, before = _state(dataset), content_of(item, dataset)
        read_under(dataset, [second], stream)
        between = _state(dataset)
        if not alike(before, content_of(item, dataset)):
            raise PrivacyError(_message("its memory was written to as the next one was read", "Return a copy"))
        again = content_of(read_under(dataset, [first], stream)[0], dataset)
        # an item that changes whenever it is read, and leaves no state, draws from the system's entropy
        has_state = alike(once, before) or not (alike(state, between) and alike(state, _state(dataset)))
        if has_state and not alike(before, again):
            raise PrivacyError(
                _message("it was another one after other items were read", "Keep no state of items in the dataset")
            )
    if reads_many(dataset):
        _check_together(dataset, first, second, third)


def _check_together(dataset: Any, first: int, second: int, third: int) -> None:
    for place, ours, others in ((0, [first, second], [first, third]), (1, [second, first], [third, first])):
        drawn: list[bool] = []
        items = [
            content_of(read_under(dataset, positions, 0, drawn)[place], dataset) for positions in (ours, ours, others)
        ]
        if place and any(drawn):  # its draws follow those of the item before it
            continue
        if alike(items[0], items[1]) and not alike(items[0], items[2]):
            raise PrivacyError(_message("it was another one among other items", "Let __getitems__ treat each alone"))


def read_under(dataset: Any, positions: list[int], stream: int, drawn: list[bool] | None = None) -> list[Any]:
    """Read items under a random stream of their own; generators of the dataset are put back."""
    restore = [generator_restorer(value) for value in _walk(dataset, 0, set()) if isinstance(value, GENERATORS)]
    with fresh_randomness(stream):
        before = host_generators(), torch.get_rng_state()
        try:
            return read(dataset, positions)
        finally:
            if drawn is not None:
                drawn.append(before[0] != host_generators() or not torch.equal(before[1], torch.get_rng_state()))
            for put_back in restore:
                put_back()


def _state(dataset: Any) -> list[Any]:
    """Return copies of what a dataset may keep: attributes, class attributes, globals and closures of its code."""
    kept: list[Any] = [dataset]
    for each in [found for found in _walk(dataset, 0, set()) if isinstance(found, Dataset)]:
        function = getattr(type(each), "__getitem__", None)
        if isinstance(function, types.FunctionType):
            cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
            kept += [*cells, *(function.__globals__.get(name) for name in function.__code__.co_names)]
        kept += [value for name, value in vars(type(each)).items() if not name.startswith("__")]
    return [value for each in kept for value in content_of(each)]


def content_of(value: Any, beyond: Any = None) -> list[Any]:
    """Return copies of the values that are reachable from an item or a dataset, without those of ``beyond``."""
    found: list[Any] = []
    for each in _walk(value, 0, {id(beyond)}):
        if isinstance(each, Tensor):
            found.append(each.detach().clone() if each.numel() <= _LARGEST else each.shape)
        elif isinstance(each, np.ndarray):
            found.append(each.copy() if each.size <= _LARGEST else each.shape)
        elif isinstance(each, (bool, int, float, complex, str, bytes, type(None))):
            found.append(each)
        elif not isinstance(each, type) and callable(getattr(each, "tobytes", None)):  # an image
            found.append(each.tobytes())
    return found


def _walk(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    yield value
    if isinstance(value, (Tensor, np.ndarray, str, bytes, int, float, *_CODE, *GENERATORS)) or depth > _DEEPEST:
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inner = list(itertools.islice(value.values(), _LONGEST))
    elif isinstance(value, (list, tuple)):
        inner = list(value[:_LONGEST])
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    for each in inner:
        yield from _walk(each, depth + 1, seen)


def is_same(record: Any, other: Any) -> bool:
    """Tell whether two records hold the same values."""
    return alike(content_of(record), content_of(other))


def alike(left: list[Any], right: list[Any]) -> bool:
    """Tell whether two results of ``content_of`` are equal."""
    return len(left) == len(right) and all(map(_equal, left, right))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.layout != torch.strided or same_values(left, right)
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == object or (left.shape == right.shape and left.tobytes() == right.tobytes())
    return type(left) is type(right) and bool(left == right or left != left)


def _message(what: str, advice: str) -> str:
    return (
        f"An item of the dataset was read, and {what}. One record could change those of others, so it could move the "
        f"sum by more than the clipping norm. {advice}: an item may depend on its own record and fresh random draws "
        "alone."
    )
