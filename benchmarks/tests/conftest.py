"""The settings of the package's own tests."""

from tests.conftest import _same_draws, _single_thread

__all__ = ["_same_draws", "_single_thread"]
