"""Settings for every test: two threads at most, so that a small machine is not oversubscribed; the same weights each time."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Seeds torch's global generator, which initialises modules; it has no part in sampling or noise."""
    torch.manual_seed(0)
