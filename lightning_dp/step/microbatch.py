"""Microbatch: one forward and backward of the user's code."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_dp.step.step import PrivateStep


class Microbatch:
    """One forward and backward of the user's code on some samples of a logical batch; a context manager.

    Args:
        step: the private step.
        count: samples.
        weight: 0 makes the samples contribute exactly nothing, as the dummy sample of an empty batch.
        divisor: number that the host divides the loss by before its backward.
        further: whether this is not the logical batch's one real call, so that no optimizer steps on it.
    """

    def __init__(self, step: PrivateStep, count: int, weight: float, divisor: int, further: bool) -> None:
        self._step = step
        self.count, self.weight, self.further = count, weight, further
        mean = step.settings.loss_reduction == "mean"
        self.scale = weight * (count if mean else 1) * divisor
        self.collected: set[int] = set()

    def __enter__(self) -> Microbatch:
        self._step.engine.begin(self.count)
        self._step.recording = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._step.engine.end()
        self._step.recording = None
