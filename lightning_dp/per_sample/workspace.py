"""Buffers for per-sample gradients that are reused in every step.

A fresh large buffer costs a page fault for every 4 KiB; writing into the buffer of the last step costs nothing extra.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

SHARE = 0.95
"""Largest size of all kept buffers together, as a share of what a step without privacy holds anyway (see ``limit``)."""

_SPARE = 1.125
"""Margin for larger Poisson batches, so that buffers are seldom made again."""


class Workspace:
    """Buffers by key, with a limit on their total size.

    **Guarantee**: a buffer is returned with its old contents: values of an earlier microbatch, which are not private.
    It must be written in full before it is read, and must never leave the engine.

    Args:
        limit: returns the largest total size at present, in bytes; called only if a buffer or tensor is to be added.

    Example:
        >>> workspace = Workspace(lambda: 64.0)
        >>> workspace.take("a", (2, 3), torch.float32, torch.device("cpu")).shape
        torch.Size([2, 3])
        >>> workspace.take("b", (100,), torch.float32, torch.device("cpu")) is None
        True
    """

    def __init__(self, limit: Callable[[], float]) -> None:
        self._limit = limit
        self._buffers: dict[Hashable, Tensor] = {}
        self._admitted: dict[Hashable, int] = {}
        self.num_bytes = 0
        """Total size, in bytes, of all buffers and admitted tensors."""

    def take(self, key: Hashable, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the buffer of a key in a given shape, with arbitrary values; None if the buffer does not fit.

        Args:
            key: one owner per key; its earlier buffer is overwritten.
            shape: of the result, which is contiguous.
            dtype: of the result.
            device: of the result.
        """
        size = math.prod(shape)
        held = self._buffers.get(key)
        if held is None or held.dtype != dtype or held.device != device or held.numel() < size:
            self.num_bytes -= self._buffers.pop(key).nbytes if held is not None else 0
            room = (self._limit() - self.num_bytes) // dtype.itemsize
            if size > room:
                return None
            held = self._buffers[key] = torch.empty(int(min(room, size * _SPARE)), dtype=dtype, device=device)
            self.num_bytes += held.nbytes
        return held[:size].view(*shape)

    def admits(self, key: Hashable, num_bytes: int) -> bool:
        """Tell whether a tensor that the caller allocates fits into the limit; if so, count its largest size."""
        if num_bytes > self._admitted.get(key, 0):
            self.num_bytes -= self._admitted.pop(key, 0)
            if num_bytes > self._limit() - self.num_bytes:
                return False
            self._admitted[key] = num_bytes
            self.num_bytes += num_bytes
        return True

    def clear(self) -> None:
        """Free every buffer."""
        self._buffers, self._admitted, self.num_bytes = {}, {}, 0
