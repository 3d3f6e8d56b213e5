"""Settings by which glibc keeps freed memory for the next step. No result depends on them.

Gain: a CNN's step without privacy takes .83 of its time, and has under 100 page faults in place of 12,000; six other
models take .98 to 1.01 (Intel Xeon with AVX-512, 2 threads; ``benchmarks/step_cost.py --modes kept`` of 2026-11-25).
Since then the mode ``kept`` also gathers the rows of its batches: with both changes, the CNN takes .92 and .87 on two
AMD EPYC.

A page that is touched for the first time costs a page fault. By default glibc maps blocks above a threshold one by one,
and returns the free end of its heap to the system. So the next step pays for its pages again.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt
_NEVER_TRIMMED = 2**31 - 1  # bytes, the largest int
_LARGEST_IN_HEAP = 2**25  # bytes, the largest M_MMAP_THRESHOLD that glibc allows on 64 bits

_keeps = False


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory until :func:`follow_default_thresholds` is called; return whether it does.

    The process is then as large between steps as within them. Nothing is changed if another C library is used, or if
    environment variables configure malloc (``MALLOC_*``, ``GLIBC_TUNABLES``).
    """
    global _keeps
    library = _glibc()
    if library is not None and not _is_set_by_user():
        mapping = library.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        _keeps = bool(mapping and library.mallopt(_TRIM_THRESHOLD, _NEVER_TRIMMED))
    return _keeps


def follow_default_thresholds() -> None:
    """Undo :func:`keep_freed_memory`, as closely as glibc allows; do nothing if it changed nothing.

    mallopt switches off glibc's dynamic thresholds, and no call switches them on again. The dynamic threshold for
    mapping rises to the size of the largest mapped block that was freed, up to 32 MiB, and the threshold for trimming
    to twice as much. So this function sets these upper limits, which glibc would reach after freeing a block of nearly
    32 MiB. A process with smaller blocks only keeps up to 64 MiB at the end of its heap, more than by default.
    """
    global _keeps
    library = _glibc()
    if _keeps and library is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_IN_HEAP)
    _keeps = False


def give_back_freed_memory() -> None:
    """Return the free memory of glibc's heap to the operating system, once."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(ctypes.c_size_t(0))


def _is_set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name.startswith("MALLOC_") for name in os.environ)


@functools.cache
def _glibc() -> Any:
    """Return the C library if it is glibc, else None. Cached, so that a forked child loads no library."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)
