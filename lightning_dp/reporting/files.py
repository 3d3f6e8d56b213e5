"""Destination of the files in which a run reports its privacy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CardFiles:
    """Destination of the privacy card.

    Args:
        enabled: whether a card is written at all.
        directory: for its files; None means the logger's.
        fallback: directory if there is no logger; None means that no card is written then.
    """

    enabled: bool = True
    directory: str | None = None
    fallback: str | None = None
