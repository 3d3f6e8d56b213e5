"""Random streams of the user's code during data loading: fresh for every item, restored afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@contextmanager
def fresh_randomness(entropy: int) -> Iterator[None]:
    """Run a block with the global generators seeded from ``entropy``, and restore their states afterwards.

    **Guarantee**: draws of the block from the global generators of torch (the CPU's, and the current CUDA device's if
    CUDA is in use), numpy and Python depend on ``entropy`` alone: not on ``seed_everything``, nor on the number of
    earlier draws. Draws after the block do not depend on the block. torch's CPU generator keeps only 32 bits of its
    seed. Not covered: generators that the user's code makes.

    Args:
        entropy: a number >= 0 of up to 128 bits: from the operating system, or from the seed of a test.

    Example:
        >>> before = torch.get_rng_state()
        >>> with fresh_randomness(7):
        ...     first = torch.rand(1)
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    words = np.random.SeedSequence(entropy).generate_state(20)
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    states = (torch.default_generator.get_state(), random.getstate(), np.random.get_state())  # noqa: NPY002
    cuda_state = torch.cuda.get_rng_state() if on_cuda else None
    try:
        torch.default_generator.manual_seed(_number(words[:2]))
        if on_cuda:
            torch.cuda.manual_seed(_number(words[2:4]))
        random.seed(_number(words[4:12]))
        np.random.seed(words[12:])  # noqa: NPY002
        yield
    finally:
        torch.default_generator.set_state(states[0])
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def _number(words: NDArray[Any]) -> int:
    return int.from_bytes(words.tobytes(), "little")
