"""Settings for the files of a privacy card."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CardFiles:
    """Settings for the files of a privacy card.

    Args:
        enabled: whether a card is written.
        directory: directory of the files; None means the logger's directory.
        fallback: directory if there is neither a directory nor a logger; None means that no card is written then.
    """

    enabled: bool = True
    directory: str | None = None
    fallback: str | None = None
