"""Seeding of the global random generators from fresh entropy, and restoring of their states."""

from __future__ import annotations

import copy
import ctypes
import random
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_WORDS = 624
"""Words of the state of a Mersenne twister."""
_MOST_BLOCKS = 10_000
"""Blocks of 624 words between two states of one stream that are looked through: 0.05 s (2 cores, 2026-11-29)."""


class RandomStreams:
    """Seeds for the global generators of torch, numpy and Python.

    Every logical batch begins with fresh seeds for dropout, augmentation and all other draws of user code, so that no
    draw depends on the number of samples in earlier batches.

    **Guarantee**: without ``seed`` every seed is fresh from the operating system: ``seed_everything`` neither fixes nor
    changes the draws of training.

    Args:
        seed: for tests only: makes the draws predictable.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._root = None if seed is None else np.random.SeedSequence([seed, 0x5EED])

    def begin(self) -> None:
        """Seed the global generators with the next seed."""
        if self._root is None:
            seed_generators(secrets.randbits(63))
        else:
            seed_generators(int(self._root.spawn(1)[0].generate_state(1, np.uint64)[0]) & (2**63 - 1))


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python.

    Without an accelerator ``torch.manual_seed`` would note a stack trace for each kind of device: 3 to 7 ms, against
    0.02 ms for the generator alone (2 cores, 2026-11-28).
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def seed_low_or_high(*, high: bool) -> None:
    """Seed numpy's and Python's global generators so that their next four uniform draws are below 0.1, or above 0.9."""
    np.random.seed(4075 if high else 273)  # noqa: NPY002
    random.seed(1643 if high else 14963)


def host_generators() -> tuple[Any, ...]:
    """Return the states of numpy's and Python's global generators in a comparable form."""
    kind, key, *rest = np.random.get_state()  # noqa: NPY002
    return (kind, np.asarray(key).tobytes(), *rest, random.getstate())


class Stream:
    """The stream of random words that a Mersenne twister is in; it equals itself however much of it was drawn.

    Args:
        block: 624 words of its state.
    """

    def __init__(self, block: bytes) -> None:
        self.block = block

    def leads_to(self, other: bytes) -> bool:
        """Tell whether one of the next states has other words."""
        twister = np.random.MT19937()
        key = np.frombuffer(self.block, np.uint32)
        twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": _WORDS}}
        return any(_next_block(twister) == other for _ in range(_MOST_BLOCKS))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stream):
            return NotImplemented
        one, two = self.block, other.block
        return one == two or self.leads_to(two) or other.leads_to(one)

    __hash__ = None  # type: ignore[assignment]


def _next_block(twister: Any) -> bytes:
    twister.random_raw(_WORDS, output=False)
    return _block_at(twister.ctypes.state_address)


def _block_at(address: int) -> bytes:
    """Return the words of a twister's state; numpy's own getter takes 70 us, Python's 13 us, this one takes 1 us."""
    return ctypes.string_at(address, 4 * _WORDS)


def _python_words() -> bytes:
    return np.array(random.getstate()[1][:_WORDS], np.uint32).tobytes()


def _address_of_python() -> int | None:
    """Return where CPython keeps the words of its global generator; None if they are not there."""
    twister: Any = random.getstate
    address = id(twister.__self__) + object.__basicsize__ + ctypes.sizeof(ctypes.c_int)
    is_there = sys.implementation.name == "cpython" and _block_at(address) == _python_words()
    return address if is_there else None


_PYTHON = _address_of_python()


def seeds() -> dict[str, Any]:
    """Return, by the name of the library, a value per global generator that drawing keeps and another seed changes."""
    words = _python_words() if _PYTHON is None else _block_at(_PYTHON)
    found: dict[str, Any] = {"torch": torch.initial_seed(), "Python": Stream(words)}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["torch.cuda"] = torch.cuda.initial_seed()
    twister = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if isinstance(twister, np.random.MT19937):
        found["numpy"] = Stream(_block_at(twister.ctypes.state_address))
    return found


def torch_generators() -> tuple[bytes, ...]:
    """Return the states of torch's global generators for the CPU and the current CUDA device."""
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return tuple(state.numpy().tobytes() for state in (torch.get_rng_state(), *devices))


def generators_restorer(device: torch.device) -> Callable[[], None]:
    """Return a function that restores the current states of the global generators: torch's for the CPU and one device,
    numpy's, Python's.
    """
    cpu, legacy, python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    on_cuda, on_mps = device.type == "cuda", device.type == "mps"
    own = torch.cuda.get_rng_state(device) if on_cuda else torch.mps.get_rng_state() if on_mps else cpu

    def restore() -> None:
        torch.set_rng_state(cpu)
        np.random.set_state(legacy)  # noqa: NPY002
        random.setstate(python)
        if on_cuda:
            torch.cuda.set_rng_state(own, device)
        elif on_mps:
            torch.mps.set_rng_state(own)

    return restore


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Restore the global generators when the context ends."""
    restore = generators_restorer(device)
    try:
        yield
    finally:
        restore()


def generator_restorer(generator: Any) -> Callable[[], Any]:
    """Return a function that restores the current state of a generator of torch, numpy or Python."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, random.SystemRandom):  # has no state
        return lambda: None
    if isinstance(generator, random.Random):
        python_state = generator.getstate()
        return lambda: generator.setstate(python_state)
    if isinstance(generator, np.random.RandomState):
        legacy_state = generator.get_state()
        return lambda: generator.set_state(legacy_state)
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    numpy_state = copy.deepcopy(bits.state)
    return lambda: setattr(bits, "state", numpy_state)
