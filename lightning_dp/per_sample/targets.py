"""Accumulation targets: views of one buffer, so that what is added to neighbours is added at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.per_sample.tracking.nodes import Region

Places = dict[str, tuple[int, torch.Size]]
"""Position of the first number and shape of each view, by name."""


def places_of(shapes: Mapping[str, torch.Size]) -> Places:
    """Return the places of views with these shapes, one after the other.

    Example:
        >>> places_of({"a": torch.Size([2, 2]), "b": torch.Size([3])})
        {'a': (0, torch.Size([2, 2])), 'b': (4, torch.Size([3]))}
    """
    starts = accumulate((shape.numel() for shape in shapes.values()), initial=0)
    return dict(zip(shapes, zip(starts, shapes.values(), strict=False), strict=True))


class Targets(Mapping[str, Tensor]):
    """Views of a buffer by name, each made when it is first read.

    Args:
        flat: buffer.
        places: of the views, in the order of the buffer.
    """

    def __init__(self, flat: Tensor, places: Places) -> None:
        self.flat, self._places = flat, places
        self._views: dict[str, Tensor] = {}

    @override
    def __getitem__(self, name: str) -> Tensor:
        if name not in self._views:
            start, shape = self._places[name]
            self._views[name] = self.flat[start : start + shape.numel()].view(shape)
        return self._views[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    @override
    def __len__(self) -> int:
        return len(self._places)

    def start(self, name: str, region: Region | None) -> int | None:
        """Return the position in the buffer of a view, or of a region of it; None if that is not one row of numbers."""
        if region is None:
            return self._places[name][0]
        offset, shape, strides = region
        numbers = 1
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            if size != 1 and stride != numbers:
                return None
            numbers *= size
        return self._places[name][0] + offset
