"""Settings for every test: one thread, because a second one waits longer than small tensors take; the same weights each time."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Seeds torch's global generator, which initialises modules; it has no part in sampling or noise."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes 3 ms for devices that are not there
