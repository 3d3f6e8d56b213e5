"""Standard normals drawn in the background, before they are needed.

Gain where a core is free: not measured. Without a free core, drawing ahead costs time: 26.9 ms in place of 24 for a
step of the benchmark's MLP (2 cores, 2 threads, 2026-11-25), because OpenMP waits for the thread whose core was taken.
So callers check :func:`has_spare_core` first.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lightning_dp.noise.sources import Stream

_CHUNK = 1 << 16

_no_fork = threading.Lock()  # held while a chunk is drawn, so that no child begins with a generator's lock held

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)


class NormalsAhead:
    """A thread that draws standard normals into a buffer that is reused.

    **Guarantee**: every number is returned at most once, and numbers that do not match the request are discarded. The
    numbers depend on the stream alone.

    Args:
        stream: source of the numbers; used for nothing else.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        # one thread, so that a draw never meets the one before, and one that is kept: starting it takes longer than a
        # chunk
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="normals-ahead")
        self._buffer = torch.empty(0)
        self._drawn: Future[Tensor] | None = None
        self._wanted: tuple[int, torch.dtype] | None = None

    def draw(self, num: int, dtype: torch.dtype) -> None:
        """Start drawing ``num`` numbers of a type, unless the same draw is pending."""
        if self._drawn is not None and self._wanted == (num, dtype):
            return
        self.take(num, dtype)
        self._wanted = (num, dtype)
        self._drawn = self._thread.submit(self._fill, num, dtype)

    def take(self, num: int, dtype: torch.dtype) -> Tensor | None:
        """Wait for the numbers and return them if their number and type match; else discard them and return None.

        Raises:
            Exception: an error of drawing.
        """
        drawn, self._drawn = self._drawn, None  # these numbers must never be used again
        if drawn is None:
            return None
        normals = drawn.result()
        return normals if self._wanted == (num, dtype) else None

    def close(self) -> None:
        """Discard the numbers, and end the thread after its current draw."""
        self._drawn = None
        self._thread.shutdown(cancel_futures=True)

    def _fill(self, num: int, dtype: torch.dtype) -> Tensor:
        if self._buffer.dtype != dtype or not num <= self._buffer.numel() <= 2 * num:
            self._buffer = torch.empty(0)  # free the old buffer first
            self._buffer = torch.empty(num, dtype=dtype)
        normals = self._buffer[:num]
        for start in range(0, num, _CHUNK):
            with _no_fork:
                self._stream(normals[start : start + _CHUNK], 1.0)
        return normals


def has_spare_core() -> bool:
    """Tell whether the process has more cores than torch has threads; if not, drawing ahead delays other work.

    False if ``OMP_NUM_THREADS`` or ``OMP_THREAD_LIMIT`` is set, because the user then chose the number of threads.
    """
    if any(name in os.environ for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT")):
        return False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > torch.get_num_threads()
