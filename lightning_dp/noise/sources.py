"""Sources of standard normals: fast generators with a given seed, and cryptographic ones.

Fast, on the CPU, the first of these that works on this machine:

- MKL's ARS-5 (five rounds of AES on a counter, 128 bits of key and 128 of counter), if the package ``mkl-random`` is
  installed: about 1 nanosecond per value, by the inverse distribution function of 32-bit uniforms.
- torch's generator: about 2.5 nanoseconds. It keeps only 32 bits of a seed, which an attacker can try one by one. So
  its whole state, 624 words, is filled instead, from 256 bits of the operating system's entropy.
- numpy's generator, if torch's state has another layout or tuning is off. Without mkl-random, a private step of the
  benchmark's embedding takes 63 ms of processor time with it, and 33 with torch's (6.4 million values; AMD EPYC with
  AVX-512, 1 thread, 9 pairs of ``benchmarks/step_cost.py`` on 2026-11-28).

The times per value are of 2026-11-25; their machine was not recorded.

Secure: AES-256 in counter mode, or the operating system itself.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dp.per_sample._torch import array_of

SECURE_DRAWS = 4  # uniform words a secure normal is made of
_STATE_BYTES = 5056  # of torch's CPU generator: seed, words left, seeded, next word, 624 words, cached normals
_STATE_WORDS = slice(24, 24 + 624 * 8)
_STATE_CACHE = slice(24 + 624 * 8, _STATE_BYTES)
_ARS5_WORDS = 8  # of 32 bits: four of the key, four of the counter
_ARS5_KNOWN = (0.7627399307981031, 0.636285213705848, 0.682237985667213, 1.1992829836684027)  # under the words 0 to 7


Stream = Callable[[Tensor, float], object]
"""Function that fills a CPU tensor (contiguous, 1-D, float32 or float64) with normals of a standard deviation."""


def normal_stream(seed: np.random.SeedSequence, *, tuned: bool = True) -> Stream:
    """Return the stream of normals of a seed. Drawing releases the interpreter lock and starts no threads.

    Args:
        seed: seed of the stream; other seeds give independent streams.
        tuned: without mkl-random, use torch's generator with a state written by hand in place of numpy's.
    """
    generator = _mkl_generator()
    if generator is not None:
        return _mkl_stream(generator, seed)
    return _torch_stream(seed) if tuned and _has_known_layout() else _numpy_stream(seed)


def threads_that_pay(num_threads: int) -> int:
    """Return the number of threads to draw on if torch's threads are busy: with MKL, one in place of two."""
    return 1 if num_threads <= 2 and _mkl_generator() is not None else num_threads


def _mkl_stream(generator: Callable[..., Any], seed: np.random.SeedSequence) -> Stream:
    state = generator(seed.generate_state(_ARS5_WORDS), brng="ARS5")

    def fill(noise: Tensor, std: float) -> None:
        values = state.normal(0.0, std, noise.numel(), "ICDF")
        if noise.dtype == torch.float64:  # one draw takes 2^32 values, enough for float32 only
            values += state.normal(0.0, std, noise.numel(), "ICDF")
            values *= math.sqrt(0.5)
        array_of(noise)[:] = values

    return fill


@functools.cache
def _mkl_generator() -> Callable[..., Any] | None:
    """Return the class of MKL's generators, or None if it is missing or fails its self-test."""
    try:
        from mkl_random import MKLRandomState

        words = np.arange(_ARS5_WORDS, dtype=np.uint32)
        state = MKLRandomState(words, brng="ARS5")
        if words.tobytes() not in state.get_state()[1]:
            raise RuntimeError("its state is not the key and the counter that it was given")
        if not np.allclose(state.normal(0.0, 1.0, 4, "ICDF"), _ARS5_KNOWN, rtol=0, atol=1e-6):
            raise RuntimeError("it draws other values than it should")
    except Exception as error:
        # a broken library may raise anything, and torch's generator is equally private
        if not (isinstance(error, ModuleNotFoundError) and error.name == "mkl_random"):
            warnings.warn(
                f"Expected a working mkl-random, got {type(error).__name__}: {error}. torch's generator draws the "
                "noise, more slowly: reinstall the package (pip install --force-reinstall mkl-random mkl) or remove "
                "it.",
                stacklevel=2,
            )
        return None
    generator: Callable[..., Any] = MKLRandomState
    return generator


def _torch_stream(seed: np.random.SeedSequence) -> Stream:
    generator = torch.Generator()
    state = generator.get_state().numpy().copy()
    state[_STATE_WORDS].view(np.uint64)[:] = seed.generate_state(624)
    state[8:16].view(np.int32)[:] = 1  # one word left, so that the next draw makes 624 new ones; seeded
    state[16:24].view(np.uint64)[:] = 0
    state[_STATE_CACHE] = 0
    generator.set_state(torch.from_numpy(state))
    return lambda noise, std: noise.normal_(std=std, generator=generator)


def _has_known_layout() -> bool:
    """Tell whether torch's CPU generator stores the state of a known seed in the layout of ``_torch_stream``."""
    seed = 5489
    state = torch.Generator().manual_seed(seed).get_state().numpy()
    if state.size != _STATE_BYTES:
        return False
    words = state[_STATE_WORDS].view(np.uint64)
    second = (1812433253 * (seed ^ (seed >> 30)) + 1) % 2**32  # Matsumoto and Nishimura's initialisation
    return bool(words[0] == seed and words[1] == second and words.max() < 2**32)


def _numpy_stream(seed: np.random.SeedSequence) -> Stream:
    generator = np.random.Generator(np.random.SFC64(seed))

    def fill(noise: Tensor, std: float) -> None:
        values = array_of(noise)
        generator.standard_normal(out=values, dtype=values.dtype.type)
        values *= std

    return fill


def secure_words() -> Callable[[int], NDArray[np.uint64]]:
    """Return a function that draws n uniform 64-bit words from a cryptographic generator."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError:
        return lambda num: np.frombuffer(os.urandom(8 * num), np.uint64)
    stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    return lambda num: np.frombuffer(stream.update(bytes(8 * num)), np.uint64)


def secure_normals(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Convert 4 n uniform words to n standard normals, each half the sum of four Box-Muller draws.

    r = sqrt(-2 ln u), u in (0, 1];   r cos(2 pi v), r sin(2 pi v), v in [0, 1)
    """
    uniforms = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius_uniforms, angle_uniforms = uniforms.reshape(2, -1)
    radius = np.sqrt(-2.0 * np.log(radius_uniforms + 2.0**-53))
    angle = 2.0 * math.pi * angle_uniforms
    draws = np.stack([radius * np.cos(angle), radius * np.sin(angle)]).reshape(SECURE_DRAWS, -1)
    total: NDArray[np.float64] = draws.sum(axis=0) / math.sqrt(SECURE_DRAWS)
    return total
