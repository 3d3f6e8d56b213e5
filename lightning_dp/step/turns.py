"""Optimizers that take turns: who steps on the next batch, if they go on as on the batches before."""

from __future__ import annotations

from collections.abc import Set

_LONGEST = 32
"""Batches of the longest turn that is found, such as those of an accumulation by hand."""


class Turns:
    """The sets of optimizers that stepped on the batches so far, which are public, and the one to expect next.

    **Guarantee**: what is expected is a function of the sets before. A batch on which other optimizers step is checked,
    so the records of a batch that needs no check have not decided who steps on it.

    Example:
        >>> turns = Turns()
        >>> for stepped in ({0}, {1}, {0}, {1}):
        ...     turns.note(stepped)
        >>> turns.expected({0, 1})
        frozenset({0})
    """

    def __init__(self) -> None:
        self._seen: list[frozenset[int]] = []

    def note(self, stepped: Set[int]) -> None:
        """Add the set of a batch."""
        self._seen = [*self._seen[1 - 2 * _LONGEST :], frozenset(stepped)]

    def expected(self, everything: Set[int]) -> frozenset[int]:
        """Return the set that continues the shortest turn of which the last batches hold two or more; without such a
        turn, ``everything``.
        """
        seen = self._seen
        for length in range(1, 1 + len(seen) // 2):
            num = min(len(seen) - length, _LONGEST)
            if seen[-num:] == seen[-num - length : -length]:
                return seen[-length]
        return frozenset(everything)
