"""Huge pages of Linux for long-lived buffers. No result depends on them.

Gain: not measured alone.
"""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

from lightning_dp.system import tuning

_HUGE_PAGE = 2**21  # bytes
_MADV_HUGEPAGE = 14


def huge_pages(tensor: Tensor) -> Tensor:
    """Request huge pages for a fresh tensor, and return the same tensor.

    Use it for long-lived buffers, because making a huge page is slow if memory is fragmented.

    Args:
        tensor: contiguous tensor. Nothing is done on devices other than the CPU, on systems other than Linux, for less
            than one huge page, or while a fit with ``tune_process=False`` runs.

    Example:
        >>> import torch
        >>> huge_pages(torch.zeros(3))
        tensor([0., 0., 0.])
    """
    if tensor.device.type == "cpu" and sys.platform == "linux" and tuning.is_allowed():
        begin = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        length = (tensor.data_ptr() + tensor.nbytes - begin) // _HUGE_PAGE * _HUGE_PAGE
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor
