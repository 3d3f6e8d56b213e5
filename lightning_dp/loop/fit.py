"""LoopFit: the private step of the user's own loop, from its first batch on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dp.loop.batches import DrawnBatch
from lightning_dp.loop.guard import ReleaseGuard
from lightning_dp.loop.host import LoopHost, LossFunction
from lightning_dp.noise import GaussianNoise
from lightning_dp.sampling import PrivateDataLoader
from lightning_dp.sandbox.sandbox import Sandbox
from lightning_dp.step import checks
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.module_checks import LayerChecks
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.settings import Settings
from lightning_dp.step.state import PrivacyState
from lightning_dp.step.step import PrivateStep
from lightning_dp.trials.trial import Trial


class LoopFit:
    """A runner of the user's loss function on logical batches, for the private step.

    A logical batch of k microbatches runs the loss function k times: the last call is the real one, whose effects stay;
    the others run in the sandbox. For an empty batch the real call runs on one record of weight 0.

    Args:
        model: holds the parameters.
        called: first argument of the loss function: the model, or a wrapper of the model.
        optimizer: optimizer of the model's parameters.
        loader: draws logical batches.
        move: moves a batch to the device.
        guard: guard over optimizer steps.
        settings: the user's arguments.
        state: ledger, accountant and position; its plan must be known.
        mechanisms: further requests of the user.
        reduction: communication between processes.
        noise: draws the noise.
        others: see ``LoopHost``.
    """

    def __init__(
        self,
        model: nn.Module,
        called: nn.Module,
        optimizer: Optimizer,
        loader: PrivateDataLoader,
        *,
        move: Callable[[Any], Any],
        guard: ReleaseGuard,
        settings: Settings,
        state: PrivacyState,
        mechanisms: Mechanisms,
        reduction: Reduction,
        noise: GaussianNoise,
        others: Callable[[], list[Any]] = list,
    ) -> None:
        self._model, self._called, self._loader = model, called, loader
        self.step = PrivateStep(
            model,
            [optimizer],
            settings=settings,
            state=state,
            mechanisms=mechanisms,
            reduction=reduction,
            noise=noise,
        )
        state.decided = mechanisms.described()
        self._host = LoopHost(
            called,
            optimizer,
            loader,
            move,
            reduction=lambda: state.loss_reduction,
            world_size=reduction.world_size,
            limit=settings.samples_at_once,
            others=others,
        )
        self._records = self._host.training
        self._sandbox = Sandbox(model, guard, self._host.reachable, nullcontext, kept=self._host.training.kept)
        self._trial = Trial(self.step, self._host, self._sandbox)
        loader.before_item = self._trial.loading.hold
        self._host.see = lambda batch: self.step.engine.see(batch)
        self._host.intercept, self._host.stepping = self.step.intercept, guard.stepping
        self._tried: set[Any] = set()  # code of loss functions
        self._layers = LayerChecks(model, runs_samples_alone=settings.counts_samples_alone)
        self._losses: list[tuple[Tensor, int]] = []

    def run(self, batch: DrawnBatch, loss_fn: LossFunction, *, begins_pass: bool) -> list[tuple[Tensor, int]]:
        """Give the parameters the private gradient of a logical batch.

        Returns:
            Loss and number of records of each microbatch; empty for an empty batch. NOT private.
        """
        self._host.loss_fn, self._losses = loss_fn, []
        batch.load()
        self._trial.losses.begin(batch)
        self._begin(begins_pass, batch.position)
        cut = self._trial.loading.begin(batch, alone=self.step.runs_samples_alone)
        for count, _, part in cut.parts:
            checks.check_rows(part, count, self._records.axes)
        if cut:
            *others, (count, owners, _) = cut.parts
            self._run_further(others)
            self._run(self._trial.transfer(cut), count, owners)
        else:
            self._run(self._records.stand_in(self._trial.copies), self._trial.copies, weight=0.0)
        self._trial.losses.check()
        self.step.finish(0)
        return self._losses

    def _begin(self, begins_pass: bool, position: int | None) -> None:
        """Begin a logical step; run the loss function on trial before the first step, and again at public steps."""
        step, trial = self.step, self._trial
        step.begin(first_of_pass=begins_pass, position=position)
        step.state.check_budget()
        if begins_pass:
            trial.begin_pass()
        self._layers.check()
        is_new = _code_of(self._host.loss_fn) not in self._tried
        if is_new or not step.engine.has_layout:
            self._records.learn_rows(next(self._model.parameters()).device)
            with self._sandbox.enter():
                self._host.find_types()
            trial.prepare()
            self._tried.add(_code_of(self._host.loss_fn))
        else:
            trial.repeat(step.state.step, first_of_pass=begins_pass)

    def _run_further(self, microbatches: list[tuple[int, Tensor | None, Any]]) -> None:
        """Run microbatches in the sandbox, each from the same state."""
        if not microbatches:
            return
        loading = self._trial.loading
        with loading.series(), self._sandbox.series() as piece:
            for number, (count, owners, part) in enumerate(microbatches, start=-len(microbatches) - 1):
                self._trial.losses.part = number
                with piece():
                    part = loading.own(number, part)
                    self.step.streams.begin()
                    self._run(self._trial.losses.move(part), count, owners, further=True)

    def _run(
        self, batch: Any, count: int, owners: Tensor | None = None, *, weight: float = 1.0, further: bool = False
    ) -> None:
        """Run forward, backward and clipping of one microbatch, and add it to the sum."""
        with self.step.microbatch(count, owners, weight=weight, further=further) as microbatch:
            self.step.engine.see(batch)
            with nullcontext() if further else self._trial.losses.watching(count):
                loss = self._host.loss_of(self._host.loss(self._called, batch), count)
            self._trial.losses.see(loss)
            loss.backward()  # type: ignore[no-untyped-call]
            self.step.backward_done()
            self.step.collect(0)
            self._trial.losses.see_backward(microbatch)
        if weight:
            self._losses.append((loss.detach(), count))


def _code_of(function: Any) -> Any:
    """Return what a loss function runs: the same for each function that a line of the user's makes again and again."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", type(function))
