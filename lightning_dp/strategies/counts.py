"""Public counters of a batch, which user code may go by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_dp.sandbox.refilling import plain_of, replace_plain
from lightning_dp.strategies import _progress

if TYPE_CHECKING:
    from lightning_dp.strategies.base import PrivateStrategy


class Counts:
    """Public counters at the beginning of a batch: the Trainer's steps, epoch and batch, and numbers that the module
    keeps.

    Args:
        strategy: runs the step.
    """

    def __init__(self, strategy: PrivateStrategy) -> None:
        self._strategy = strategy
        self._values = self._read()
        self._after: int | None = None
        self.decided: list[tuple[int, ...]] = []
        """Steps of optimizers from these counters, in order, once single samples have decided likewise."""
        self._attributes, self._names = plain_of(strategy.module.__dict__), {*strategy.module.__dict__}

    @classmethod
    def of_batch(cls, strategy: PrivateStrategy, before: Counts | None, *, stopped: bool) -> Counts:
        """Return the counters before a batch, or those before the one in which user code has asked for the end."""
        if before is None or not stopped:
            return cls(strategy)
        before.end()
        return before

    def end(self) -> None:
        """Take note of the Trainer's steps at the end of the batch, once."""
        if self._after is None:
            self._after = self._read()[0]

    @contextmanager
    def back_in(self, *, after: bool = False) -> Iterator[None]:
        """Set the counters to their values at creation; afterwards restore them.

        Args:
            after: whether the Trainer's steps are those of ``end``.
        """
        before = self._read()
        self._set(self._values)
        if after and self._after is not None:
            self._set([self._after])
        undo = replace_plain(self._strategy.module.__dict__, self._attributes, self._names)
        try:
            yield
        finally:
            self._set(before)
            undo()

    def _read(self) -> list[Any]:
        return _progress.counters(self._strategy.trainer)

    def _set(self, values: list[Any]) -> None:
        _progress.set_counters(self._strategy.trainer, values)
