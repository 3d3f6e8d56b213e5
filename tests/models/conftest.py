"""No look-ups on a hub, and the fixtures of the hand-written models."""

from __future__ import annotations

import os

from tests.strategies.test_models import _own_weights, own_draws

os.environ["HF_HUB_OFFLINE"] = "1"

__all__ = ["_own_weights", "own_draws"]
