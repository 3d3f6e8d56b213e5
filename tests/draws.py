"""Draws that repeat: sampling, noise and probes of a test are the same in each run.

The package draws keys from the operating system, which no seed of a user reaches. Tests of such draws would fail once
in a hundred runs, and then not again. Set the variable ``DRAWS`` to another word to have other draws.
"""

from __future__ import annotations

import os
import random
import secrets

_OWN = secrets.randbits, secrets.token_hex, os.urandom


def repeat_draws(name: str) -> None:
    """Let a generator stand for that of the operating system, and seed the global ones; not for forks of this process.

    Args:
        name: of the test or process; it chooses the draws.
    """
    import numpy as np  # not at once: the process that hands out the tests needs neither
    import torch

    generator = random.Random(f"{name} {os.environ.get('DRAWS', '')}")
    _draw_by(generator.getrandbits, lambda num=32: generator.randbytes(num).hex(), generator.randbytes)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.default_generator.manual_seed(0)


def _draw_by(*functions: object) -> None:
    secrets.randbits, secrets.token_hex, os.urandom = functions  # type: ignore[assignment]


os.register_at_fork(after_in_child=lambda: _draw_by(*_OWN))
