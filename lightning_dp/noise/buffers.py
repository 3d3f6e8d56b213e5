"""Checks of noise buffers, their chunk size, and detection of forked processes."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

DEVICE_CHUNK = 1 << 24
"""Number of coordinates drawn at a time on devices other than the CPU; it bounds the scratch buffer."""

_num_forks = 0


def _count_fork() -> None:
    global _num_forks
    _num_forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


def num_forks() -> int:
    """Return the number of forks from the first process to this one; if it grew, older generators are the parent's."""
    return _num_forks


def check_buffer(tensor: Tensor, std: float) -> None:
    """Check that noise of a standard deviation can be written into a buffer.

    Raises:
        TypeError: a buffer that is neither float32 nor float64.
        ValueError: a buffer that is not contiguous, or a std that is negative, not finite, or out of the type's range.
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"Expected a float32 or float64 buffer, got dtype={tensor.dtype}. Lower precision would round noise away: "
            "add it before converting."
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"Expected a contiguous buffer, got stride={tensor.stride()} for shape={tensor.shape}. "
            "Call contiguous() first."
        )
    if not 0 <= std < math.inf:
        raise ValueError(f"Expected 0 <= std < inf, got std={std}. Check noise and bound.")
    limits = torch.finfo(tensor.dtype)
    if std != 0 and not limits.tiny <= std <= limits.max:
        raise ValueError(f"Expected std within the range of {tensor.dtype}, got std={std}. Rescale the buffer.")
