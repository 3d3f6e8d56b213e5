"""No look-ups on a hub, and the fixtures of the hand-written models."""

from __future__ import annotations

import os

from tests.strategies.test_models import _one_thread, own_draws

os.environ["HF_HUB_OFFLINE"] = "1"

__all__ = ["_one_thread", "own_draws"]
