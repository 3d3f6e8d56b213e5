"""Watch of what user code writes within a batch, and of the seeds that it gives to random generators."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_dp.sandbox.looks import Look, step_of
from lightning_dp.sandbox.randomness import seeds


class When(enum.Enum):
    """The time of a write, from the beginning of a batch on."""

    FORWARD = "until the end of the forward"
    HELD = "after the forward, before anything of the batch is released"
    RELEASED = "after a release"


class WriteWatch:
    """A watch of what is written within a batch until its forward ends, and from there to the beginning of the next.

    Args:
        look: takes a look, given an earlier one or None.
        see: is given the keys of writes, and when they were made.
        num_released: returns the number of releases so far.
    """

    def __init__(
        self,
        look: Callable[[Look | None], Look],
        see: Callable[[Iterable[Any], When], None],
        num_released: Callable[[], int],
    ) -> None:
        self._take, self._see, self._num_released = look, see, num_released
        self._known: dict[When, set[Any]] = {when: set() for when in When}
        self._last: Look | None = None
        self._begun: Look | None = None  # before the batch, until its forward has ended
        self._released = 0  # number of releases when the forward ended
        self._is_aside = False
        self._seeds: dict[str, Any] = {}  # before the forward
        self._given: dict[str, Any] = {}  # by the last forward that gave one

    def begin(self) -> Look:
        """Begin a batch, before it is moved to the device; return a look at the state. Further calls return the same
        one until the forward has ended.
        """
        if self._begun is None:
            self._begun = self.read()
        return self._begun

    def begin_forward(self) -> None:
        """Begin the user's forward."""
        self._seeds = seeds()

    def end_forward(self) -> None:
        """Read what was written since the batch began."""
        self.read()
        self._see(self._new_seeds(self._known[When.FORWARD]), When.FORWARD)
        self._begun, self._released = None, self._num_released()

    def read(self) -> Look:
        """Read what was written since the last look, and return a look at the state of now."""
        last, self._last = self._last, self._take(self._last)
        held = When.RELEASED if self._num_released() > self._released else When.HELD
        when = held if self._begun is None else When.FORWARD
        if last is not None:
            self._see(last.writes_until(self._last, self._known[when]), when)
        return self._last

    def read_aside(self) -> None:
        """Read what the forward of a further microbatch has written, which the sandbox puts back."""
        if self._last is not None:
            known = self._known[When.FORWARD]
            self._see(self._last.writes_until(self._take(self._last), known), When.FORWARD)

    def _new_seeds(self, known: set[Any]) -> Iterator[tuple[str, str]]:
        """Yield a key for each generator that the forward has given another seed, the first time."""
        for name, seed in seeds().items():
            if self._seeds.get(name, seed) == seed:
                continue
            before, self._given[name] = self._given.get(name), seed
            key = "seed", name, *step_of(("seed", name), before, seed, known)
            if key not in known:
                known.add(key)
                yield key

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Do not look at what is written within the context, and put back: this counts as a change of tensors."""
        if self._is_aside:
            yield
            return
        self.read()
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside, self._last = False, self._take(self._last)
