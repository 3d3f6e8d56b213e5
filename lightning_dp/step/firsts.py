"""Values that a real batch shows for the first time: sizes of rows, and those that user code reads."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

MOST = 4
"""New values at one place, after which others there are expected to come all the time."""

MOST_AT_ONCE = 16
"""Checks of new values at once; later ones once in 100 steps."""


class Firsts:
    """The values that batches have shown at certain places, and whether real ones have shown new ones.

    Example:
        >>> firsts = Firsts()
        >>> firsts.see([("line 3", False)], checked=True)
        >>> firsts.see([("line 3", False)])
        >>> firsts.is_new
        False
        >>> firsts.see([("line 3", True)])
        >>> firsts.is_new
        True
    """

    def __init__(self) -> None:
        self._known: set[tuple[Hashable, Hashable]] = set()
        self._num_new: dict[Hashable, int] = {}
        self._num_checked = self._checked_at = 0
        self.is_new = False
        """True if real batches have shown a new value since ``settle``."""

    def see(self, found: Iterable[tuple[Hashable, Hashable]], *, checked: bool = False) -> None:
        """Read the places and values of a batch.

        Args:
            found: places and values.
            checked: whether the batch is one of a check.
        """
        for place, value in found:
            if (place, value) in self._known:
                continue
            number = self._num_new.get(place, 0)
            if checked or number < MOST:
                self._known.add((place, value))
            if not checked and number < MOST:
                self._num_new[place] = number + 1
                self.is_new = True

    def are_due(self, number: int) -> bool:
        """Tell whether to check new values in a logical step."""
        return self.is_new and (self._num_checked < MOST_AT_ONCE or number - self._checked_at >= 100)

    def settle(self, number: int) -> None:
        """Count new values as checked in a logical step."""
        if self.is_new:
            self._num_checked, self._checked_at, self.is_new = self._num_checked + 1, number, False
