"""Tuning of the process while a fit runs, undone afterwards.

These are tuned, each with its gain in its own file: glibc keeps freed memory (``allocator.py``), torch's waiting
threads are ended before noise is drawn in threads (``openmp.py``, ``noise/cpu.py``), and torch's generator starts from
a state that is written by hand (``noise/sources.py``).
"""

from __future__ import annotations

import os
import threading
from types import TracebackType

from lightning_dp.system import allocator, openmp


class ProcessTuning:
    """All process-wide tuning of private fits, active from ``start`` to ``stop``.

    Two fits in one process may overlap: the memory settings are undone when the last of them stops. ``start`` and
    ``stop`` may be called twice. A forked child begins without tuning.

    Noise has a switch of its own, ``GaussianNoise(tuned=False)``; its threads end in ``GaussianNoise.close``.

    Args:
        enabled: False leaves the process alone.

    Example:
        >>> with ProcessTuning(enabled=False) as tuning:
        ...     tuning.describe()
        'Process tuning is off (tune_process=False).'
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.keeps_memory = False
        """True if freed memory is kept for this fit."""

    def start(self, *, on_cpu: bool = True) -> None:
        """Start the tuning, unless it is active.

        Args:
            on_cpu: whether the fit computes on the CPU. On other devices the memory settings stay unchanged.
        """
        with _lock:
            if self not in _running:
                _running.append(self)
                self.keeps_memory = self.enabled and on_cpu and allocator.keep_freed_memory()

    def stop(self) -> None:
        """Stop the tuning; undo the memory settings and return free memory to the system if no other fit needs them."""
        with _lock:
            if self not in _running:
                return
            _running.remove(self)
            if self.keeps_memory and not any(other.keeps_memory for other in _running):
                allocator.follow_default_thresholds()
                allocator.give_back_freed_memory()
            self.keeps_memory = False

    def describe(self) -> str:
        """Return one line for the log: the active tuning, or the reason for none."""
        if not self.enabled:
            return "Process tuning is off (tune_process=False)."
        tuned = ["glibc keeps freed memory"] if self.keeps_memory else []
        if self in _running and openmp.can_end_waiting_threads():
            tuned.append("OpenMP threads that wait are ended before much noise is drawn")
        if not tuned:
            return "Process tuning changes nothing here."
        return f"Process tuning until the end of fit: {'; '.join(tuned)}. Switch it off by tune_process=False."

    def __enter__(self) -> ProcessTuning:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()


_running: list[ProcessTuning] = []
_lock = threading.Lock()


def _begin_child() -> None:
    """Switch off all tuning in a forked child. Do not trim its memory, which would slow every data worker."""
    global _lock
    _lock = threading.Lock()
    for tuning in _running:
        tuning.keeps_memory = False
    _running.clear()
    allocator.follow_default_thresholds()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)
