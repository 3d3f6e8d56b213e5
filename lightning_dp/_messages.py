"""Messages for the user, from rank 0 only."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core import rank_zero

# Lightning sets the rank when it is imported; a plain loop in one process never does.
if getattr(rank_zero.rank_zero_only, "rank", None) is None:
    rank_zero.rank_zero_only.rank = 0  # type: ignore[attr-defined]


def info(message: str) -> None:
    """Log a message at level INFO on rank 0, through Lightning's logger if Lightning is imported."""
    rank_zero.rank_zero_info(message)


def warn(message: str, **options: Any) -> None:
    """Issue a warning on rank 0."""
    rank_zero.rank_zero_warn(message, stacklevel=5, **options)
