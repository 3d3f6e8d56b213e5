"""The threads that torch computes on, between two computations.

GNU's OpenMP, which torch uses on Linux, lets them wait awake: for some milliseconds after a computation they keep their cores
busy, so that the next one finds them ready. A thread of ours that draws numbers meanwhile takes turns with them, and two
such threads on two cores are no faster than one. OpenMP 5.0 has a call that ends them; the next computation starts new ones,
which takes about a tenth of a millisecond for one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable

_SOFT = 1  # omp_pause_soft: what the program has set stays set

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def end_waiting_threads() -> bool:
    """End the threads that wait for computations of the calling thread; return whether none is left to wait.

    No result depends on it. Nothing is done, and the answer is no, where torch computes with another library than GNU's OpenMP,
    and in a forked child, which has its parent's list of threads but none of them.

    Example:
        >>> import torch
        >>> ended = end_waiting_threads()
        >>> torch.ones(3).sum()
        tensor(3.)
    """
    end = _pause()
    return end is not None and not _forked and end()


@functools.cache
def _pause() -> Callable[[], bool] | None:
    """Return what ends the threads, or None where the library is not loaded or is older than the call (GCC 9)."""
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # torch's own: it is never loaded here
        pause, host = library.omp_pause_resource, library.omp_get_initial_device()
    except (OSError, AttributeError):
        return None
    return lambda: pause(_SOFT, host) == 0
