"""How the memory of a process on Linux is asked for and kept. Advice to the system: no result depends on it.

A page that is touched for the first time costs a fault. glibc hands what lies free at the end of its heap back to the system,
and asks for it again in the next step: a fifth of a step was seen to go into that.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from torch import Tensor

_LARGE_PAGE = 2**21
_MADV_HUGEPAGE = 14
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt
_MOST_KEPT = 2**31 - 1
_LARGEST_IN_HEAP = 2**25  # the most that glibc allows
_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def large_pages(tensor: Tensor) -> Tensor:
    """Ask Linux to back a fresh tensor by large pages; return the same tensor.

    For buffers that are kept for long: making a large page takes long where memory is scattered.

    Args:
        tensor: contiguous; left as it is unless it lies in the memory of a Linux process and has room for a large page.

    Example:
        >>> import torch
        >>> large_pages(torch.zeros(3))
        tensor([0., 0., 0.])
    """
    if tensor.device.type == "cpu" and sys.platform == "linux":
        begin = -(-tensor.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        length = (tensor.data_ptr() + tensor.nbytes - begin) // _LARGE_PAGE * _LARGE_PAGE
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step, in this process, from now on; return whether it does.

    The process is then as large between steps as in them. Nothing is changed where the user has set glibc's thresholds in the
    environment, and where another C library is used.
    """
    if not _uses_glibc() or any(name in os.environ for name in _ENVIRONMENT):
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP) and library.mallopt(_TRIM_THRESHOLD, _MOST_KEPT))


def give_back_freed_memory() -> None:
    """Hand what is free in glibc's heap back to the system once."""
    if _uses_glibc():
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _uses_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
