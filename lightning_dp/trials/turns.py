"""Optimizers that take turns: who steps on the next batch, if they go on as on the batches before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_LONGEST = 32
"""Batches of the longest turn that is found, such as those of an accumulation by hand."""


class Turns:
    """The steps of optimizers on the batches so far, in order, which are public, and those to expect next.

    **Guarantee**: what is expected is a function of the steps before. A batch with other steps, or another order of
    them, is checked, so the records of a batch that needs no check have not decided who steps on it.

    Example:
        >>> turns = Turns()
        >>> for stepped in ([0], [1, 1], [0], [1, 1]):
        ...     turns.note(stepped)
        >>> turns.expected({0, 1})
        (0,)
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, ...]] = []

    def note(self, stepped: Sequence[int]) -> None:
        """Add the steps of a batch."""
        self._seen = [*self._seen[1 - 2 * _LONGEST :], tuple(stepped)]

    def expected(self, everything: Iterable[int]) -> tuple[int, ...]:
        """Return the steps that continue the shortest turn of which the last batches hold two or more; without such a
        turn, one of ``everything`` after the other.
        """
        seen = self._seen
        for length in range(1, 1 + len(seen) // 2):
            num = min(len(seen) - length, _LONGEST)
            if seen[-num:] == seen[-num - length : -length]:
                return seen[-length]
        return tuple(sorted(everything))
