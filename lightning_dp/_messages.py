"""Messages for the user, from rank 0 only."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def without_warnings(pattern: str = "") -> Iterator[None]:
    """Drop warnings whose text begins with a pattern within the context.

    Unlike ``warnings.catch_warnings``, this keeps Python's memory of which warnings it has shown, by which it shows
    each warning of user code once.

    Args:
        pattern: a regular expression; default: all warnings.
    """
    ignored: Any = ("ignore", re.compile(pattern), Warning, None, 0)
    warnings.filters.insert(0, ignored)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with suppress(ValueError):  # user code has reset all filters
            warnings.filters.remove(ignored)  # type: ignore[attr-defined]
