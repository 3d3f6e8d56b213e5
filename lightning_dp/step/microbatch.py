"""Microbatch: one forward and backward of the user's code."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import num_operations
from lightning_dp.per_sample.owners.own_losses import OwnLosses
from lightning_dp.sandbox.readings import Readings, restore
from lightning_dp.system.torch_private import num_hooks

if TYPE_CHECKING:
    from lightning_dp.step.step import PrivateStep


def own_losses(step: PrivateStep, count: int) -> AbstractContextManager[object]:
    """Return a context in which each of some records has its own loss, if the step computes losses so."""
    if not step.takes_own_losses or step.runs_samples_alone:
        return nullcontext()
    layers = step.parameters.layers.now()
    constants = [*layers.parameters(), *layers.buffers()]
    return OwnLosses(count, step.state.loss_reduction, constants, lambda: step.engine.follower)


class Microbatch:
    """One forward and backward of the user's code on some records of a logical batch; a context manager.

        g_i = scale_i * gradient of the back-propagated loss with respect to the rows of sample i

    **Guarantee**: ``g_i`` is the gradient of the loss of record i, or of user i: the mean or the sum over its records.

    Args:
        step: the private step.
        count: number of records.
        owners: position of each record's user, ascending; None if each record is a sample.
        weight: 1, or 0 for records that contribute exactly nothing, such as the dummy record of an empty batch.
        divisor: number that the host divides the loss by before its backward.
        further: True for all calls but the one real call of a logical batch; no optimizer steps on them.
    """

    def __init__(
        self, step: PrivateStep, count: int, owners: Tensor | None, weight: float, divisor: int, further: bool
    ) -> None:
        self._step, self._owners = step, owners
        self.count, self.weight, self.further = count, weight, further
        mean = step.state.loss_reduction == "mean"
        self.scale: float | Tensor = weight * (count if mean else 1) * divisor
        """Factor from the recorded gradient of each sample to that of its own loss; one, or shape (B,) in float64."""
        if owners is not None and step.settings.unit_gradient == "mean":
            self.scale = self.scale / torch.bincount(owners.cpu()).double()
        self.collected: list[int] = []
        self.began = self.num_hooks = 0
        """Number of differentiable operations, and of hooks, before the forward."""
        self.readings = Readings()
        """Values that user code has read from tensors."""
        self._hears = step.settings.check_per_sample and not step.runs_samples_alone
        self._own_losses = own_losses(step, count)

    @property
    def constants(self) -> list[tuple[Hashable, Tensor]]:
        """Values of no record that functions of parameters, or losses of records, were computed with, by keys."""
        figures = self._own_losses.figures if isinstance(self._own_losses, OwnLosses) else []
        return [*self._step.engine.constants(), *figures]

    def __enter__(self) -> Microbatch:
        step = self._step
        step.engine.begin(self.count, self._owners)
        step.recording = self
        self._own_losses.__enter__()
        if self._hears:
            self.readings.__enter__()
        else:
            restore()  # compiled code, which only runs on samples alone, does not know what takes the functions' place
        self.began, self.num_hooks = num_operations(), num_hooks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hears:
            self.readings.__exit__(None, None, None)
        self._own_losses.__exit__(kind, error, trace)
        self._step.engine.end()
        self._step.recording = None


def end_all(recording: Microbatch | None) -> None:
    """End, with a fit, a microbatch that an error has left open, and the watch of values that user code reads."""
    if recording is not None:
        recording.__exit__(None, None, None)
    restore()
