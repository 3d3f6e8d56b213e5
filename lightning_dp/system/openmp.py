"""Ending of torch's idle compute threads between computations, so that noise can be drawn on their cores.

Gain: a private step takes .73 of its time on the benchmark's embedding and .95 on its MLP, since two threads draw 6.4
million values in 19.8 ms in place of 26.7, and 1.86 million in 5.5 in place of 8.2 (AMD EPYC with AVX2, 2 threads,
commit before against commit after, 11 pairs of ``benchmarks/step_cost.py`` on 2026-11-27).

GNU's OpenMP, which torch uses on Linux, lets threads wait actively: they keep their cores busy for some milliseconds
after a computation, so that the next computation finds them ready. A thread that draws noise meanwhile must share their
cores. OpenMP 5.0 has a call that ends the waiting threads. The next computation starts new ones, in about a tenth of a
millisecond for one thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable

_SOFT = 1  # omp_pause_soft: the program's settings are kept
_ENVIRONMENT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # the user's settings of how threads wait

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def can_end_waiting_threads() -> bool:
    """Tell whether waiting threads can be ended: GNU's OpenMP, no wait policy set, no forked child."""
    return not _forked and not any(name in os.environ for name in _ENVIRONMENT) and _pause() is not None


def end_waiting_threads() -> bool:
    """End the idle compute threads of the calling thread; return whether they ended.

    No result depends on it. Do nothing and return False if torch does not use GNU's OpenMP, if ``OMP_WAIT_POLICY`` or
    ``GOMP_SPINCOUNT`` is set, or in a forked child, which has its parent's list of threads but none of these threads.

    Example:
        >>> import torch
        >>> ended = end_waiting_threads()
        >>> torch.ones(3).sum()
        tensor(3.)
    """
    end = _pause()
    return end is not None and can_end_waiting_threads() and end()


@functools.cache
def _pause() -> Callable[[], bool] | None:
    """Return the function that ends the threads, or None without GNU's OpenMP of GCC 9 or later on Linux."""
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # torch's own: it is never loaded here
        pause, host = library.omp_pause_resource, library.omp_get_initial_device()
    except (OSError, AttributeError):
        return None
    return lambda: pause(_SOFT, host) == 0
