"""Independent Gaussian noise: its scale, its rounding, and the single use of every value.

Standard normals are drawn in ``sources.py``, on the CPU by the threads of ``cpu.py``.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dp.noise.buffers import DEVICE_CHUNK, check_buffer, num_forks
from lightning_dp.noise.cpu import NUM_STREAMS, CpuStreams
from lightning_dp.noise.sources import SECURE_DRAWS, secure_normals, secure_words

_SECURE_CHUNK = 1 << 16
_GRID_BITS = 20  # the grid's step is at most std 2^-20: its own variance is below 1e-13 of the noise's


class GaussianNoise:
    """Independent Gaussian noise for every coordinate of a buffer, in place.

        add_:  tensor[j] += N(0, std^2)   for every j
        fill_: tensor[j]  = N(0, std^2)   for every j; a sum built in the buffer afterwards is noisy from the start

    Fast variant (default). CPU: four streams, each started from 256 bits of the operating system's entropy: MKL's ARS-5
    if the package ``mkl-random`` is installed (extra ``fast``; 1.6 times as fast on one thread), else torch's generator
    with its whole state filled. float32 noise is within 6.2 standard deviations with MKL (but for one value of 2^32,
    -8.3) and within 5.8 with torch. Other devices: the device's own torch generator, seeded with 64 bits from the
    operating system.

    Secure variant (``secure=True``): uniform bits come from a cryptographic generator (AES-256 in counter mode under a
    key from the operating system if the package ``cryptography`` is installed, else the slower ``os.urandom``). Each
    value is half the sum of four independent Box-Muller normals in float64, so the result does not reveal the
    floating-point grid of a single draw. The value is added in float64 on the CPU, and the sum is rounded to the
    nearest multiple of a public grid:

        tensor[j] = grid round((tensor[j] + N(0, std^2)) / grid),   grid = 2^(floor(log2 std) - 20)

    The grid's step is between 2^-21 std and 2^-20 std. Every released value is a multiple of it, so it has no lower
    bits that would reveal the numbers added. The value is rounded to the buffer's type after that. Cost: about 0.3
    microseconds per coordinate, some hundred times the cost of the fast variant.

    **Guarantee**: every coordinate gets its own noise of standard deviation ``std``; no value is ever used twice, by
    this object, by a copy, or by a forked child. ``torch.manual_seed``, ``numpy.random.seed`` and ``seed_everything``
    do not affect the noise. Its state cannot be saved: a copy or pickle has fresh entropy, even if the original had a
    seed, because noise used twice cancels out. Not covered: an adversary who sees the generator's memory; rounding of
    the sums before noise is added; values beyond 2^31 ``std``, which float64 cannot keep on the grid; and, for the fast
    variant, low bits (see above) and an adversary who can reconstruct a generator that is not cryptographic.

    Args:
        seed: for tests only: whoever knows it can subtract the noise. ``None``: the operating system's entropy. A seed
            gives the same noise for any number of threads, but other noise with ``mkl-random`` than without.
        secure: whether to use the cryptographic variant.
        tuned: False draws in the calling thread only, ends no OpenMP threads, and uses numpy's generator in place of
            torch's with a state written by hand. The distribution is the same; a seed gives other noise.

    Raises:
        ValueError: a seed together with ``secure=True``.

    Example:
        >>> sums = torch.zeros(3)
        >>> noisy = GaussianNoise().add_(sums, std=2.0)
        >>> noisy is sums, bool((noisy != 0).all())
        (True, True)

    References:
        Holohan and Braghin 2021, Secure Random Sampling in Differential Privacy, section 5 (the secure variant).
        Mironov 2012, On Significance of the Least Significant Bits for Differential Privacy.
    """

    def __init__(self, *, seed: int | None = None, secure: bool = False, tuned: bool = True) -> None:
        if secure and seed is not None:
            raise ValueError(
                f"Expected seed=None with secure=True, got seed={seed}. Secure noise cannot be repeated: leave one out."
            )
        self.secure = secure
        self.tuned = tuned
        self._start(seed)

    def add_(self, tensor: Tensor, std: float) -> Tensor:
        """Add N(0, std^2) to every coordinate, in place.

        **Guarantee**: see the class. The standard deviation must be public.

        Args:
            tensor: contiguous float32 or float64 buffer of any shape, on any device.
            std: standard deviation, finite and >= 0; 0 leaves the buffer unchanged.

        Returns:
            The same tensor, now noisy; it may be released if ``std`` was calibrated to the sensitivity of its content.

        Raises:
            TypeError: another type of tensor.
            ValueError: a buffer that is not contiguous, or a ``std`` that is negative, not finite, or so small that
                the buffer's type would turn it into zero.
            Exception: an error of drawing.
        """
        check_buffer(tensor, std)
        if std > 0:
            self._write(tensor.detach().view(-1), std, adds=True)
        return tensor

    def fill_(self, tensor: Tensor, std: float) -> Tensor:
        """Overwrite every coordinate with N(0, std^2); cheaper than adding noise to a sum later.

        **Guarantee**: see the class. A sum that is built in the buffer afterwards is as private as a sum with noise
        added at the end, if ``std`` was calibrated to its sensitivity. Only the secure variant's grid is lost.

        Args:
            tensor: as for :meth:`add_`; its values are not read.
            std: standard deviation, finite and >= 0; 0 writes zeros.

        Returns:
            The same tensor.

        Raises:
            TypeError: as :meth:`add_`.
            ValueError: as :meth:`add_`.
            Exception: as :meth:`add_`.

        Example:
            >>> sums = GaussianNoise().fill_(torch.full((3,), torch.nan), std=2.0)
            >>> bool(sums.isfinite().all())
            True
        """
        check_buffer(tensor, std)
        if std > 0:
            self._write(tensor.detach().view(-1), std, adds=False)
        else:
            tensor.detach().zero_()
        return tensor

    def _write(self, flat: Tensor, std: float, *, adds: bool) -> None:
        self._refuse_the_parents_state()
        if self.secure:
            self._add_secure(flat if adds else flat.zero_(), std)
        elif flat.device.type == "cpu":
            self._streams.write(flat, std, adds=adds)
        else:
            self._write_device(flat, std, adds=adds)

    def close(self) -> None:
        """End the threads. A later call starts new ones.

        Example:
            >>> noise = GaussianNoise()
            >>> noise.close()
            >>> bool((noise.add_(torch.zeros(3), std=1.0) != 0).all())
            True
        """
        if self._fork == num_forks():  # else its threads belong to the parent
            self._streams.close()

    def __reduce__(self) -> tuple[Callable[[], GaussianNoise], tuple[()]]:
        return partial(GaussianNoise, secure=self.secure, tuned=self.tuned), ()

    def _refuse_the_parents_state(self) -> None:
        """Start new streams in a forked child, because the parent continues the old ones."""
        if self._fork != num_forks():
            self._start(None)

    def _start(self, seed: int | None) -> None:
        self._fork = num_forks()
        self._root = None if seed is None else np.random.SeedSequence(seed)
        self._streams = CpuStreams(self._children(NUM_STREAMS), tuned=self.tuned)
        self._device_generators: dict[torch.device, torch.Generator] = {}
        self._random_words = secure_words() if self.secure else None

    def _children(self, num: int) -> list[np.random.SeedSequence]:
        """Return independent seeds: children of the root under a seed, else 256 bits of entropy for each."""
        if self._root is not None:
            return self._root.spawn(num)
        return [np.random.SeedSequence(secrets.randbits(256)) for _ in range(num)]

    def _write_device(self, flat: Tensor, std: float, *, adds: bool) -> None:
        generator = self._device_generators.get(flat.device)
        if generator is None:
            generator = torch.Generator(device=flat.device)
            generator.manual_seed(int(self._children(1)[0].generate_state(1, np.uint64)[0]))
            self._device_generators[flat.device] = generator
        if not adds:
            flat.normal_(std=std, generator=generator)
            return
        for start in range(0, flat.numel(), DEVICE_CHUNK):
            chunk = flat[start : start + DEVICE_CHUNK]
            chunk.add_(torch.empty_like(chunk).normal_(generator=generator), alpha=std)

    def _add_secure(self, flat: Tensor, std: float) -> None:
        assert self._random_words is not None
        grid = math.ldexp(1.0, math.frexp(std)[1] - 1 - _GRID_BITS)
        for start in range(0, flat.numel(), _SECURE_CHUNK):
            chunk = flat[start : start + _SECURE_CHUNK]
            noise = secure_normals(self._random_words(chunk.numel() * SECURE_DRAWS))
            noise *= std
            noise += chunk.cpu().numpy()
            chunk.copy_(torch.from_numpy(_on_grid(noise, grid)).to(flat.dtype))


def _on_grid(values: NDArray[np.float64], grid: float) -> NDArray[np.float64]:
    """Round values in place to multiples of ``grid``, a power of two; values of 2^52 steps and more stay unchanged."""
    near = np.abs(values) < grid * 2.0**52
    np.divide(values, grid, out=values, where=near)
    np.rint(values, out=values, where=near)
    np.multiply(values, grid, out=values, where=near)
    return values
