"""End torch's idle compute threads between computations, so that noise can be drawn on their cores.

Gain: a private step takes .73 of its time on the benchmark's embedding and .95 on its MLP, since two threads draw 6.4
million values in 19.8 ms in place of 26.7, and 1.86 million in 5.5 in place of 8.2 (AMD EPYC with AVX2, 2 threads,
commit before against commit after, 11 pairs of ``benchmarks/step_cost.py`` on 2026-11-27).

GNU's OpenMP, which torch uses on Linux, lets threads wait awake: they keep their cores busy for some milliseconds after
a computation, so that the next one finds them ready. A thread of ours that draws numbers meanwhile takes turns with
them. OpenMP 5.0 has a call that ends them; the next computation starts new ones, which takes about a tenth of a
millisecond for one.
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
    """Tell whether torch's OpenMP library can end its threads, and the environment sets no wait policy."""
    return not _forked and not any(name in os.environ for name in _ENVIRONMENT) and _pause() is not None


def end_waiting_threads() -> bool:
    """End the idle compute threads of the calling thread; return whether all of them ended.

    No result depends on it. Nothing is done, and the answer is no, if torch computes with another library than GNU's
    OpenMP, if ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` is set, and in a forked child, which has its parent's list of
    threads but none of them.

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
    """Return the function that ends the threads, or None if the library is not loaded or older than GCC 9."""
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # torch's own: it is never loaded here
        pause, host = library.omp_pause_resource, library.omp_get_initial_device()
    except (OSError, AttributeError):
        return None
    return lambda: pause(_SOFT, host) == 0
