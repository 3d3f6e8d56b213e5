"""Gaussian noise from the operating system's entropy.

torch's CPU generator keeps 32 bits of the seed it is given, which can be tried one by one. So it is not seeded: its whole
state, 624 words, is filled from 256 bits of the operating system's entropy. Where a version of torch lays that state
out in another way, numpy's generator draws instead, at about half the speed.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NUM_STREAMS = 4  # a constant, so that a seed gives the same noise whatever the number of threads
_CPU_CHUNK = 1 << 15  # coordinates a stream draws at a time: the buffer stays in the processor's cache
_STATE_BYTES = 5056  # of torch's CPU generator: seed, words left, seeded, next word, 624 words, cached normals
_STATE_WORDS = slice(24, 24 + 624 * 8)
_STATE_CACHE = slice(24 + 624 * 8, _STATE_BYTES)
_DEVICE_CHUNK = 1 << 24
_SECURE_CHUNK = 1 << 16
_SECURE_DRAWS = 4
_GRID_BITS = 20  # the grid's step is at most std 2^-20: its own variance is below 1e-13 of the noise's

_num_forks = 0


def _count_fork() -> None:
    global _num_forks
    _num_forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class GaussianNoise:
    """Adds independent Gaussian noise to every coordinate of a buffer, in place.

        tensor[j] += N(0, std^2)   for every j

    Fast variant (default). CPU: four streams of torch's generator, the whole state of each filled from 256 bits of the
    operating system's entropy. Other devices: the device's own torch generator, seeded with 64 bits from the operating system.

    Secure variant (``secure=True``): uniform bits from a cryptographic generator (AES-256 in counter mode under a key
    from the operating system if the package ``cryptography`` is installed, else ``os.urandom`` itself, slower); each
    value is half the sum of four independent Box-Muller normals in float64, so that the grid of the
    floating-point numbers of a single draw cannot be read off the result; it is added in float64 on the CPU, and the sum is
    rounded to the nearest multiple of a public grid:

        tensor[j] = grid round((tensor[j] + N(0, std^2)) / grid),   grid = 2^(floor(log2 std) - 20)

    Every released value is a whole number of steps between 2^-21 std and 2^-20 std, whatever was in the buffer: bits below
    the grid, which would tell which numbers were added, do not exist. The rounding to the buffer's type that follows sees
    the grid's value only. Cost: about 0.3 microseconds a coordinate, some hundred times the fast variant's.

    **Guarantee**: every coordinate gets its own noise of standard deviation ``std``; no value is ever used twice, by
    this object, by a copy, or by a forked child. ``torch.manual_seed``, ``numpy.random.seed`` and ``seed_everything``
    neither fix nor move it. Its state cannot be saved: pickling or copying gives a generator with fresh entropy, also
    where the original had a seed, for noise used twice cancels out. Not covered: an adversary who sees the generator's
    memory; sums of contributions that were rounded before they got here; values beyond 2^31 ``std``, which float64 cannot
    keep on the grid; and, for the fast variant, low bits (see above) and one who can reconstruct a generator that is not
    cryptographic.

    Args:
        seed: for tests only: whoever knows it can subtract the noise. ``None``: the operating system's entropy.
        secure: whether to use the cryptographic variant.

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

    def __init__(self, *, seed: int | None = None, secure: bool = False) -> None:
        if secure and seed is not None:
            raise ValueError(
                f"Expected seed=None with secure=True, got seed={seed}. Secure noise cannot be repeated: leave one out."
            )
        self.secure = secure
        self._start(seed)

    @property
    def seeded(self) -> bool:
        """Whether the noise follows from a seed given by the user, who must then keep it secret."""
        return self._root is not None

    @torch.no_grad()
    def add_(self, tensor: Tensor, std: float) -> Tensor:
        """Add N(0, std^2) to every coordinate, in place.

        **Guarantee**: see the class. The standard deviation must be public.

        Args:
            tensor: contiguous float32 or float64 buffer of any shape, on any device.
            std: standard deviation, finite and >= 0; 0 leaves the buffer as it is.

        Returns:
            The same tensor; noisy, hence releasable if ``std`` was calibrated to what it holds.

        Raises:
            TypeError: another type of tensor.
            ValueError: a buffer that is not contiguous, or a ``std`` that is negative, not finite, or so small that
                the buffer's type would turn it into zero.
        """
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"Expected a float32 or float64 buffer, got dtype={tensor.dtype}. Lower precision would round noise "
                "away: add it before converting."
            )
        if not tensor.is_contiguous():
            raise ValueError(f"Expected a contiguous buffer, got stride={tensor.stride()} for shape={tensor.shape}.")
        if not 0 <= std < math.inf:
            raise ValueError(f"Expected 0 <= std < inf, got std={std}.")
        if std == 0:
            return tensor
        limits = torch.finfo(tensor.dtype)
        if not limits.tiny <= std <= limits.max:
            raise ValueError(f"Expected std within the range of {tensor.dtype}, got std={std}. Rescale the buffer.")
        if self._fork != _num_forks:
            self._start(None)
        flat = tensor.detach().view(-1)
        if self.secure:
            self._add_secure(flat, std)
        elif flat.device.type == "cpu":
            self._add_cpu(flat, std)
        else:
            self._add_device(flat, std)
        return tensor

    def __reduce__(self) -> tuple[Callable[[bool], GaussianNoise], tuple[bool]]:
        return (_fresh, (self.secure,))

    def _start(self, seed: int | None) -> None:
        self._fork = _num_forks
        self._root = None if seed is None else np.random.SeedSequence(seed)
        self._streams = [_cpu_stream(child) for child in self._children(_NUM_STREAMS)]
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}
        self._device_generators: dict[torch.device, torch.Generator] = {}
        self._random_words = _word_source() if self.secure else None

    def _children(self, num: int) -> list[np.random.SeedSequence]:
        """Return independent seeds: parts of the root under a seed, else each its own 256 bits of entropy."""
        if self._root is not None:
            return self._root.spawn(num)
        return [np.random.SeedSequence(secrets.randbits(256)) for _ in range(num)]

    def _add_cpu(self, flat: Tensor, std: float) -> None:
        @torch.no_grad()
        def add_stream(number: int) -> None:
            key = (number, flat.dtype)
            if key not in self._buffers:
                self._buffers[key] = torch.empty(_CPU_CHUNK, dtype=flat.dtype)
            for start in range(number * _CPU_CHUNK, flat.numel(), _NUM_STREAMS * _CPU_CHUNK):
                target = flat[start : start + _CPU_CHUNK]
                noise = self._buffers[key][: target.numel()]
                self._streams[number](noise)
                target.add_(noise, alpha=std)

        num_threads = min(_NUM_STREAMS, torch.get_num_threads(), -(-flat.numel() // _CPU_CHUNK))
        if num_threads <= 1:
            for number in range(_NUM_STREAMS):
                add_stream(number)
        else:  # drawing is the cost and releases the interpreter; no thread outlives the call
            with ThreadPoolExecutor(num_threads) as pool:
                list(pool.map(add_stream, range(_NUM_STREAMS)))

    def _add_device(self, flat: Tensor, std: float) -> None:
        generator = self._device_generators.get(flat.device)
        if generator is None:
            generator = torch.Generator(device=flat.device)
            generator.manual_seed(int(self._children(1)[0].generate_state(1, np.uint64)[0]))
            self._device_generators[flat.device] = generator
        for start in range(0, flat.numel(), _DEVICE_CHUNK):
            chunk = flat[start : start + _DEVICE_CHUNK]
            chunk.add_(torch.empty_like(chunk).normal_(generator=generator), alpha=std)

    def _add_secure(self, flat: Tensor, std: float) -> None:
        assert self._random_words is not None
        grid = math.ldexp(1.0, math.frexp(std)[1] - 1 - _GRID_BITS)
        for start in range(0, flat.numel(), _SECURE_CHUNK):
            chunk = flat[start : start + _SECURE_CHUNK]
            noise = _secure_normals(self._random_words(chunk.numel() * _SECURE_DRAWS))
            noise *= std
            noise += chunk.cpu().numpy()
            chunk.copy_(torch.from_numpy(_on_grid(noise, grid)).to(flat.dtype))


def _on_grid(values: NDArray[np.float64], grid: float) -> NDArray[np.float64]:
    """Round to multiples of a power of two: exact, but for values of 2^52 steps and more, which stay as they are."""
    near = np.abs(values) < grid * 2.0**52
    np.divide(values, grid, out=values, where=near)
    np.rint(values, out=values, where=near)
    np.multiply(values, grid, out=values, where=near)
    return values


def _cpu_stream(seed: np.random.SeedSequence) -> Callable[[Tensor], object]:
    """Return a function that fills a tensor with standard normals from a stream of its own."""
    generator = torch.Generator()
    state = generator.get_state().numpy().copy()
    if not _has_known_layout():
        numpy_generator = np.random.Generator(np.random.SFC64(seed))
        return lambda noise: numpy_generator.standard_normal(out=noise.numpy(), dtype=noise.numpy().dtype.type)
    state[_STATE_WORDS].view(np.uint64)[:] = seed.generate_state(624)
    state[8:16].view(np.int32)[:] = 1  # one word left, so that the next draw makes 624 new ones; seeded
    state[16:24].view(np.uint64)[:] = 0
    state[_STATE_CACHE] = 0
    generator.set_state(torch.from_numpy(state))
    return lambda noise: noise.normal_(generator=generator)


def _has_known_layout() -> bool:
    """Whether torch's CPU generator keeps its state as ``_cpu_stream`` writes it: seen from what a known seed leaves there."""
    seed = 5489
    state = torch.Generator().manual_seed(seed).get_state().numpy()
    if state.size != _STATE_BYTES:
        return False
    words = state[_STATE_WORDS].view(np.uint64)
    second = (1812433253 * (seed ^ (seed >> 30)) + 1) % 2**32  # Matsumoto and Nishimura's initialisation
    return bool(words[0] == seed and words[1] == second and words.max() < 2**32)


def _fresh(secure: bool) -> GaussianNoise:
    return GaussianNoise(secure=secure)


def _word_source() -> Callable[[int], NDArray[np.uint64]]:
    """Return a function from n to n uniform 64-bit words of a cryptographic generator."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError:
        return lambda num: np.frombuffer(os.urandom(8 * num), np.uint64)
    stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    return lambda num: np.frombuffer(stream.update(bytes(8 * num)), np.uint64)


def _secure_normals(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn 4 n uniform words into n standard normals, each half the sum of four Box-Muller draws.

    r = sqrt(-2 ln u), u in (0, 1];   r cos(2 pi v), r sin(2 pi v), v in [0, 1)
    """
    uniforms = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius_uniforms, angle_uniforms = uniforms.reshape(2, -1)
    radius = np.sqrt(-2.0 * np.log(radius_uniforms + 2.0**-53))
    angle = 2.0 * math.pi * angle_uniforms
    draws = np.stack([radius * np.cos(angle), radius * np.sin(angle)]).reshape(_SECURE_DRAWS, -1)
    total: NDArray[np.float64] = draws.sum(axis=0) / math.sqrt(_SECURE_DRAWS)
    return total
