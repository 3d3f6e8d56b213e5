"""Patches: temporary changes of a fit in the user's and Lightning's objects; ``docs/patched.md`` lists them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.sampling import LogicalBatch
from lightning_dp.sandbox.writes import When
from lightning_dp.step.released import Gradients
from lightning_dp.step.step import PrivateStep
from lightning_dp.strategies import _lightning
from lightning_dp.strategies.counts import Counts
from lightning_dp.strategies.overrides import Overrides
from lightning_dp.trials.trial import Trial

if TYPE_CHECKING:
    from lightning_dp.strategies.base import PrivateStrategy


class Patches:
    """Methods of module and optimizers that are replaced on the instance while a fit runs.

    Args:
        strategy: strategy of the Trainer.
        step: private step, which forgets backprops when ``zero_grad`` is called.
        trial: checks an epoch that user code ends early.
        noted: takes the arguments of ``clip_gradients``, to be compared as state.
        is_on_trial: tells whether user code runs in the sandbox.
    """

    def __init__(
        self,
        strategy: PrivateStrategy,
        step: PrivateStep,
        trial: Trial,
        noted: dict[str, Any],
        is_on_trial: Callable[[], bool],
    ) -> None:
        self._strategy, self._step, self._trial, self._is_on_trial = strategy, step, trial, is_on_trial
        self._noted = noted
        self._overrides = Overrides()
        self._clips: dict[int, Callable[[], None]] = {}
        self._released: Gradients | None = None

    @property
    def is_rehearsing(self) -> bool:
        """True if a trial lets private optimizers step, on gradients that do not depend on the records."""
        return self._step.probe is not None and self._step.probe.rehearses

    def apply(self) -> None:
        """Replace the methods."""
        wrappers = _lightning.lightning_optimizers(self._strategy)  # which manual optimization gives to the user
        for index, both in enumerate(zip(self._strategy.optimizers, wrappers, strict=True)):
            for optimizer in both if index not in self._strategy.settings.public_optimizers else ():
                self._overrides.set(optimizer, "zero_grad", self._discarding(index, optimizer.zero_grad))
        module = self._strategy.module
        if _lightning.is_overridden("on_train_batch_start", module):
            self._overrides.set(module, "on_train_batch_start", self._checking_skips(module.on_train_batch_start))
        if not self._step.automatic:
            self._overrides.set(module, "clip_gradients", self._clipping_later(module.clip_gradients))
        elif _lightning.is_overridden("optimizer_step", module):
            self._overrides.set(module, "optimizer_step", self._checking_steps(module.optimizer_step))
        owners = [module, self._strategy.trainer.datamodule]  # type: ignore[attr-defined]
        if any(owner is not None and _lightning.is_overridden("on_before_batch_transfer", owner) for owner in owners):
            _lightning.replace_transfer_hook(self._overrides, module, lambda batch: isinstance(batch, LogicalBatch))

    def undo(self) -> None:
        """Restore the methods of all objects."""
        self._overrides.undo()

    def released(self, optimizer: Optimizer) -> None:
        """Watch private gradients; clip them once if ``clip_gradients`` was called under manual optimization."""
        self._released = None if self._is_on_trial() else Gradients(optimizer)
        clip = self._clips.pop(id(optimizer), None)
        if clip is not None:
            clip()

    def stepped(self) -> None:
        """Read which private gradients user code has changed since their release."""
        if self._released is not None:
            self._trial.written.see(self._released.writes(), When.RELEASED)
            self._released = None

    def _checking_skips(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return the module's ``on_train_batch_start`` with a check that skipping does not depend on the records."""

        @functools.wraps(hook)
        def begin_batch(*args: Any, **kwargs: Any) -> Any:
            answer = hook(*args, **kwargs)
            if isinstance(answer, int) and answer == -1 and not self._is_on_trial():
                self._trial.decisions.check_end_of_epoch()
            return answer

        return begin_batch

    def _checking_steps(self, optimizer_step: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``optimizer_step`` of the module; whether it leaves a step out may not depend on the records."""

        @functools.wraps(optimizer_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            if self._is_on_trial():
                return optimizer_step(*args, **kwargs)
            counts, before = Counts(self._strategy), self._step.state.steps_taken
            answer = optimizer_step(*args, **kwargs)
            if self._step.settings.check_per_sample:
                has_stepped = self._step.state.steps_taken > before
                self._trial.decisions.check_steps([*self._step.accumulators] if has_stepped else [], counts)
            return answer

        return step

    def _clipping_later(self, clip_gradients: Callable[..., None]) -> Callable[..., None]:
        """Return a ``clip_gradients`` that acts when its optimizer steps, because no private gradient exists
        earlier.
        """

        @functools.wraps(clip_gradients)
        def clip_later(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            held = getattr(optimizer, "optimizer", optimizer)
            number = next((number for number, one in enumerate(self._strategy.optimizers) if one is held), -1)
            for name, value in [*enumerate(args), *kwargs.items()]:
                self._noted[f"{name} of clip_gradients, optimizer {number}"] = value
            if not self._is_on_trial() or self.is_rehearsing:
                self._clips[id(held)] = functools.partial(clip_gradients, held, *args, **kwargs)

        return clip_later

    def _discarding(self, index: int, zero_grad: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(zero_grad)
        def discard(*args: Any, **kwargs: Any) -> None:
            self._step.discard(index)
            with unfollowed():  # followed parameters would report each question for their gradient
                zero_grad(*args, **kwargs)

        return discard
