"""Noise on the CPU: four streams, on several threads where that is faster.

Gain of the threads: 1.86 million values take 5.5 ms on two threads in place of 8.2 on one, 6.4 million 19.8 in place of
26.7 (AMD EPYC with AVX2, MKL's generator, 2026-11-27; the gain per step is in ``system/openmp.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor

from lightning_dp.noise.sources import normal_stream, threads_that_pay
from lightning_dp.system.openmp import end_waiting_threads

NUM_STREAMS = 4  # a constant, so that a seed gives the same noise whatever the number of threads
CHUNK = 1 << 15  # coordinates that a stream draws at a time: they stay in the processor's cache
_LEAST_PER_WAITING_THREAD = 1 << 18  # coordinates per torch thread from which ending those threads pays


class CpuStreams:
    """Four independent streams of normals that fill a buffer, or add to it, chunk by chunk in turn.

    Args:
        seeds: one per stream.
        tuned: draw on several threads, and prefer torch's generator with a state written by hand to numpy's. The
            numbers of a seed depend on the generator, not on the threads.
    """

    def __init__(self, seeds: Sequence[np.random.SeedSequence], *, tuned: bool = True) -> None:
        assert len(seeds) == NUM_STREAMS
        self._streams = [normal_stream(seed, tuned=tuned) for seed in seeds]
        self._tuned = tuned
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}
        self._threads: ThreadPoolExecutor | None = None  # cached: starting one takes as long as drawing some chunks

    def write(self, flat: Tensor, std: float, *, adds: bool) -> None:
        """Add N(0, std^2) to every coordinate of a one-dimensional buffer, or overwrite it if ``adds`` is False.

        Raises:
            Exception: an error of drawing. No thread writes into the buffer after the call.
        """
        if 0 < flat.numel() <= CHUNK:
            self._write_chunk(0, flat, std, adds=adds)
            return
        num_threads = _threads_for(flat.numel()) if self._tuned else 1
        if num_threads == 1:
            for number in range(NUM_STREAMS):
                self._write_stream(number, flat, std, adds=adds)
            return

        @torch.no_grad()
        def write_streams(first: int) -> None:
            for number in range(first, NUM_STREAMS, num_threads):
                self._write_stream(number, flat, std, adds=adds)

        if self._threads is None:
            self._threads = ThreadPoolExecutor(NUM_STREAMS - 1, thread_name_prefix="noise")
        others = [self._threads.submit(write_streams, first) for first in range(1, num_threads)]
        try:
            write_streams(0)
        finally:
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads and free the scratch buffers. The next call of ``write`` starts new ones."""
        threads, self._threads = self._threads, None
        self._buffers = {}
        if threads is not None:
            threads.shutdown()

    def _write_stream(self, number: int, flat: Tensor, std: float, *, adds: bool) -> None:
        """Write the noise of one stream to every fourth chunk, starting with chunk ``number``."""
        for start in range(number * CHUNK, flat.numel(), NUM_STREAMS * CHUNK):
            self._write_chunk(number, flat[start : start + CHUNK], std, adds=adds)

    def _write_chunk(self, number: int, target: Tensor, std: float, *, adds: bool) -> None:
        """Write the next noise of one stream to a chunk."""
        stream = self._streams[number]
        if not adds:
            stream(target, std)
            return
        noise = self._buffer(number, target.dtype)[: target.numel()]
        stream(noise, std)
        sums = target.numpy()
        sums += noise.numpy()  # cheaper per call than torch's, and too short for threads

    def _buffer(self, number: int, dtype: torch.dtype) -> Tensor:
        key = (number, dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(CHUNK, dtype=dtype)
        return self._buffers[key]


def _threads_for(num: int) -> int:
    """Return the number of threads for drawing ``num`` numbers; end torch's waiting threads if that pays.

    It is at most torch's number of threads, so ``OMP_NUM_THREADS`` and ``torch.set_num_threads`` are limits here too.
    """
    computing = torch.get_num_threads()
    num_threads = min(NUM_STREAMS, computing, max(1, -(-num // CHUNK)))
    if num_threads > 1 and not (num >= _LEAST_PER_WAITING_THREAD * computing and end_waiting_threads()):
        return threads_that_pay(num_threads)
    return num_threads
