"""Correlated noise without stored draws: each draw is repeated from a key and its step."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from lightning_dp import _validate as check
from lightning_dp.errors import PrivacyError
from lightning_dp.noise.buffers import DEVICE_CHUNK, check_buffer, num_forks
from lightning_dp.noise.correlated import CorrelatedNoise
from lightning_dp.noise.sources import normal_stream

_MOST_SLICES = 8  # of a buffer on the CPU; how many there are depends on its size alone, never on the threads
_SMALLEST_SLICE = 1 << 18  # coordinates: starting a stream takes as long as drawing about that many
_CPU_CHUNK = 1 << 15  # coordinates drawn at a time: the scratch buffer stays in the processor's cache


class CorrelatedGaussianNoise:
    """Correlated Gaussian noise for one buffer, in place; every call is one logical step.

        fill_ at step t:  tensor = std v_t,   v_t = sum_{j < p} r_j z_{t-j},   z_{t-j} = 0 before the history began
        add_  at step t:  tensor += std v_t

    ``z_t`` is determined by a key and t, and is drawn again in each of p steps. Only a scratch buffer of fixed size is
    kept. For a noise multiplier sigma, pass ``std`` = sigma * sens(C) * (clipping bound of step t).

    **Guarantee**: ``z`` of two steps, objects, ranks or coordinates are independent; each is standard normal. The key
    is 256 bits of the operating system's entropy; it is never saved. A copy, a pickle and a forked child get a key of
    their own and begin an empty history (C becomes block-diagonal, which never raises its sensitivity). Global seeds
    have no influence. Size, type and device of the buffer must stay the same for the whole history, because noise is
    cancelled only where it was added, so a change raises. Not covered: the exclusions of ``GaussianNoise`` for its fast
    variant. There is no secure variant.

    Args:
        settings: planned settings (no ``decay="auto"``).
        steps: most logical steps that may be drawn, >= 1: the steps left in the planned run.
        seed: for tests only: whoever knows it can subtract the noise. ``None``: the operating system's entropy.

    Raises:
        ValueError: ``decay="auto"``, or a number out of range.
        TypeError: a number of another type.

    Example:
        >>> noise = CorrelatedGaussianNoise(CorrelatedNoise(decay=0.9), steps=2)
        >>> first, second = noise.fill_(torch.empty(3), 1.0), noise.fill_(torch.empty(3), 1.0)
        >>> noise.step
        2

    References:
        Kalinin et al. 2026, arXiv 2601.22334: noise drawn again instead of stored.
    """

    def __init__(self, settings: CorrelatedNoise, *, steps: int, seed: int | None = None) -> None:
        self.settings = settings
        self.steps = check.check_count("steps", steps)
        self._inverse = settings.inverse
        self._start(seed)

    @torch.no_grad()
    def add_(self, tensor: Tensor, std: float) -> Tensor:
        """Add ``std * v_t`` to every coordinate, in place, and advance to the next step.

        **Guarantee**: see the class. ``std`` must be public.

        Args:
            tensor: contiguous float32 or float64 buffer of any shape, on any device; the same kind at every step.
            std: standard deviation of ``std * z_t``, finite and >= 0.

        Returns:
            The same tensor.

        Raises:
            TypeError: another type of tensor.
            ValueError: a buffer that is not contiguous, or ``std`` out of range.
            PrivacyError: more steps than planned, or another kind of buffer than at the step before.
        """
        return self._write(tensor, std, adds=True)

    @torch.no_grad()
    def fill_(self, tensor: Tensor, std: float) -> Tensor:
        """Overwrite every coordinate with ``std * v_t``, and advance to the next step.

        Args:
            tensor: as for :meth:`add_`; its values are not read.
            std: as for :meth:`add_`.

        Returns:
            The same tensor.

        Raises:
            TypeError: as :meth:`add_`.
            ValueError: as :meth:`add_`.
            PrivacyError: as :meth:`add_`.
        """
        return self._write(tensor, std, adds=False)

    def __reduce__(
        self,
    ) -> tuple[Callable[[CorrelatedNoise, int], CorrelatedGaussianNoise], tuple[CorrelatedNoise, int]]:
        return (_fresh, (self.settings, self.steps - self.step))

    def _start(self, seed: int | None) -> None:
        self._fork = num_forks()
        self._key = secrets.randbits(256) if seed is None else seed
        self.step = 0
        """Number of logical steps drawn since the history began."""
        self._buffer: tuple[int, torch.dtype, torch.device] | None = None

    def _write(self, tensor: Tensor, std: float, *, adds: bool) -> Tensor:
        check_buffer(tensor, std)
        if self._fork != num_forks():  # a forked child: the parent continues with the same key
            self.steps -= self.step
            self._start(None)
        if self.step >= self.steps:
            raise PrivacyError(
                f"The planned {self.steps} steps of correlated noise are drawn. One privacy event covers exactly "
                "these, so a further release would not be accounted for. Plan a longer run from its start."
            )
        kind = (tensor.numel(), tensor.dtype, tensor.device)
        if self._buffer not in (None, kind):
            raise PrivacyError(
                f"The buffer of correlated noise changed from {self._buffer} to {kind}. Noise of earlier steps would "
                "not be cancelled where it was added. Keep mask, type and device for the whole run, or use "
                "independent noise."
            )
        self._buffer = kind
        flat = tensor.detach().view(-1)
        if not adds:
            flat.zero_()
        now, self.step = self.step, self.step + 1  # this draw counts as used even if an error follows
        terms = [(r, now - lag) for lag, r in enumerate(self._inverse[: now + 1])]
        if std > 0:
            (self._add_cpu if flat.device.type == "cpu" else self._add_device)(flat, std, terms)
        return tensor

    def _seed(self, step: int, number: int) -> np.random.SeedSequence:
        """Return the seed of the draw ``z_step`` for slice ``number`` of the buffer."""
        return np.random.SeedSequence(self._key, spawn_key=(step, number))

    def _add_cpu(self, flat: Tensor, std: float, terms: list[tuple[float, int]]) -> None:
        num_slices = min(_MOST_SLICES, max(1, flat.numel() // _SMALLEST_SLICE))
        edges = [flat.numel() * number // num_slices for number in range(num_slices + 1)]

        @torch.no_grad()
        def add_slice(number: int) -> None:
            target = flat[edges[number] : edges[number + 1]].numpy()
            scratch = torch.empty(min(_CPU_CHUNK, len(target)), dtype=flat.dtype)
            for r, step in terms:
                stream = normal_stream(self._seed(step, number))
                for start in range(0, len(target), _CPU_CHUNK):
                    sums = target[start : start + _CPU_CHUNK]
                    noise = scratch[: len(sums)]
                    stream(noise, std)
                    values = noise.numpy()
                    values *= r
                    sums += values

        num_threads = min(num_slices, torch.get_num_threads())
        if num_threads == 1:
            for number in range(num_slices):
                add_slice(number)
            return
        with ThreadPoolExecutor(num_threads, thread_name_prefix="noise") as threads:
            list(threads.map(add_slice, range(num_slices)))

    def _add_device(self, flat: Tensor, std: float, terms: list[tuple[float, int]]) -> None:
        generator = torch.Generator(device=flat.device)
        for number, start in enumerate(range(0, flat.numel(), DEVICE_CHUNK)):
            chunk = flat[start : start + DEVICE_CHUNK]
            scratch = torch.empty_like(chunk)
            for r, step in terms:
                generator.manual_seed(int(self._seed(step, number).generate_state(1, np.uint64)[0]))
                chunk.add_(scratch.normal_(generator=generator), alpha=r * std)


def _fresh(settings: CorrelatedNoise, steps: int) -> CorrelatedGaussianNoise:
    noise = CorrelatedGaussianNoise(settings, steps=max(1, steps))
    noise.steps = steps
    return noise
