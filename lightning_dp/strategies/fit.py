"""PrivateFit: the private step of one ``Trainer.fit`` call, and the user's code around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.noise import GaussianNoise
from lightning_dp.sampling import LogicalBatch
from lightning_dp.sandbox.randomness import generators_restorer
from lightning_dp.sandbox.sandbox import Sandbox, StepGuard
from lightning_dp.step import checks
from lightning_dp.step.microbatch import Microbatch
from lightning_dp.step.module_checks import LayerChecks
from lightning_dp.step.planning import begin_batch
from lightning_dp.step.step import PrivateStep
from lightning_dp.strategies import _lightning
from lightning_dp.strategies.counts import Counts
from lightning_dp.strategies.host import LightningHost
from lightning_dp.strategies.logs import TrainingLogs
from lightning_dp.strategies.patches import Patches
from lightning_dp.trials.trial import Trial

if TYPE_CHECKING:
    from lightning_dp.strategies.base import PrivateStrategy


class PrivateFit:
    """The state of one ``Trainer.fit`` call.

    A logical batch of k microbatches runs the user's ``training_step`` k times: the last call is the real one, whose
    effects stay, as under a plain Trainer; the others run in the sandbox. If no sample was drawn, the real call runs on
    one record of weight 0. So the state afterwards does not depend on the number of samples drawn.

    Args:
        strategy: strategy of the Trainer, already set up.
        noise: draws the noise.
    """

    def __init__(self, strategy: PrivateStrategy, noise: GaussianNoise) -> None:
        self._strategy = strategy
        module, trainer = strategy.module, strategy.trainer
        self._trainer, self._device = trainer, strategy.root_device
        self._restore_generators = generators_restorer(self._device)
        self._batch: LogicalBatch | None = None
        self._on_device: Any = None
        self._part, self._prepared = 0, False
        self._layers = LayerChecks(module, runs_samples_alone=strategy.settings.counts_samples_alone)
        self._counts: Counts | None = None  # public counters before the last batch
        self.step = PrivateStep(
            module,
            strategy.optimizers,
            settings=strategy.settings,
            state=strategy.state,
            mechanisms=strategy.mechanisms,
            reduction=strategy.make_reduction(),
            noise=noise,
            automatic=module.automatic_optimization,
        )
        self.guard = StepGuard(self.step.parameters.is_private)
        self._host = LightningHost(strategy)
        settle = self._host.settling(self.step.reduction.settle)
        self._sandbox = Sandbox(module, self.guard, self._host.reachable, self._quiet, settle, self._host.training.kept)
        self._trial = Trial(self.step, self._host, self._sandbox)
        self.before_item = self._trial.loading.hold
        self._logs = TrainingLogs(trainer, strategy.state.nonprivate_logs, strict=strategy.settings.strict_logging)
        self.patches = Patches(strategy, self.step, self._trial, vars(self._host.clips), lambda: self.on_trial)
        self.guard.start()
        self.patches.apply()
        self._host.hooks.watch(lambda: self.on_trial)

    def close(self) -> None:
        """Undo all patches, and restore the global generators to their states before the fit."""
        self.step.close()
        self.guard.stop()
        self._host.hooks.unwatch()
        self.patches.undo()
        self._logs.detach()
        self._restore_generators()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Silence logs and progress of user code in the sandbox."""
        with self._logs.muted(), self._host.quiet():
            yield

    @property
    def on_trial(self) -> bool:
        """True while user code runs in the sandbox, where no optimizer may step."""
        return self.guard.in_sandbox > 0

    def only_own_callbacks(self) -> AbstractContextManager[None]:
        """Return a context for the step of an optimizer: on trial without callbacks that take no part in it."""
        return self._host.own_callbacks() if self.on_trial else nullcontext()

    # ---------------------------------------------------------------- one logical batch

    def take(self, batch: LogicalBatch) -> Any:
        """Return the last microbatch on the device, for the real call; for an empty batch, tensors of length 0."""
        self._batch = self._trial.loading.begin(batch)
        self._trial.written.watch.begin()
        self._on_device = self._trial.transfer(batch) if batch else self._host.empty_batch(self._trial.copies)
        return self._on_device

    def check_callbacks(self) -> None:
        """Check, once a callback has begun to change the module, that its writes do not depend on the records.

        Raises:
            PrivacyError: the writes depend on the records.
        """
        if self._prepared and (found := self._host.hooks.take_before()) is not None:
            for seed in range(4):  # a figure of two records may be on the same side of a threshold
                self._trial.written.check(seed, **found)

    def check_end(self) -> None:
        """Raise PrivacyError, at the end of a fit, if callbacks or the end of the run depend on the records."""
        self.check_callbacks()
        if self._prepared:
            self._trial.written.watch.read()
            self._trial.losses.check(at_end=True)
        if self.step.reduction.any(self._host.hooks.stopped) and self._counts is not None:
            self._counts.end()
            self._trial.decisions.check_stop(self._counts.back_in)

    def run(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the user's code on a logical batch; return the output of the real call.

        Raises:
            PrivacyError: the private loader did not draw the batch, or the batch was used already.
        """
        batch, self._batch = checks.drawn(self._batch), None
        self._host.arguments = rest, kwargs
        self._trial.losses.begin(batch, read=self._host.hooks.readings.take())
        self._counts = Counts.of_batch(self._strategy, self._counts, stopped=self._host.hooks.stopped)
        self._layers.check()
        self.check_callbacks()
        try:
            if self._begins_logical_batch():
                self._begin(batch.position)
            else:  # draws must not follow what hooks have seeded since the last part
                self.step.streams.begin()
            if not self.step.automatic or self._trainer.accumulate_grad_batches > 1:
                self._trial.decisions.check_loss()
                self._trial.losses.check()
            if self.step.unchecked_public:
                self._trial.decisions.check_public()
            parts = self._cut(batch).parts
            for count, _, part in parts:
                checks.check_rows(part, count, self._host.training.axes)
            num = max(1, len(parts))
            others = [None] * (self.step.reduction.same_count(num) - num) + parts[:-1]
            if others:
                self._run_further(others)
            if not parts:
                return self._run_real(self._host.idle_batch(self._trial.copies), self._trial.copies, weight=0.0)
            return self._run_real(self._on_device, *parts[-1][:2])
        except StopIteration as error:  # Lightning would treat it as the end of the data and skip this step
            raise RuntimeError(checks.STOP_ITERATION) from error

    def _cut(self, batch: LogicalBatch) -> LogicalBatch:
        """Return the batch in microbatches of one sample if samples run one at a time."""
        if not self.step.runs_samples_alone or all(count == 1 for count, _ in batch.microbatches):
            return batch
        cut = self._trial.loading.begin(batch, alone=True)
        self._on_device = self._strategy.to_device(cut.microbatches[-1][1])
        return cut

    def _begins_logical_batch(self) -> bool:
        """Tell whether a logical batch begins: the loader starts a new one, or Lightning has stepped.

        The two agree, except after a resume from within an accumulation, because the loader then starts over. Parts of
        two logical batches must never be summed, since one sample may be in both.
        """
        trainer = self._trainer
        index, parts = trainer.fit_loop.batch_idx, trainer.accumulate_grad_batches
        checks.check_accumulation(parts, self._strategy.loader.facts.accumulate)
        if index == 0 or not self._prepared:
            self._part = 0
        begins = self._part == 0 or index % parts == 0
        self._part = (self._part + 1) % parts
        return begins

    def _begin(self, position: int | None) -> None:
        begins = self._trainer.fit_loop.batch_idx == 0 or not self._prepared
        begin_batch(self._strategy, begins_pass=begins)
        self.step.begin(first_of_pass=begins, position=position)
        if begins:
            self._trial.begin_pass()
        if not (self._prepared and self.step.engine.has_layout):
            self._host.training.learn_rows(self._device)
            self._trial.prepare()
            self._prepared = True
            self.check_callbacks()
        else:
            self._trial.repeat(self.step.state.step, first_of_pass=begins)

    def _run_further(self, microbatches: list[tuple[int, Tensor | None, Any] | None]) -> None:
        """Run all microbatches except the real call's in the sandbox, each from the same state.

        Where another rank has more, one is None: a record of weight 0 runs instead.
        """
        step = self.step
        counts = None if step.automatic else Counts(self._strategy)
        stops = self._host.hooks.watching_stops(self._strategy.module, "training_step")
        with (loading := self._trial.loading).series(), self._sandbox.series() as piece, stops:
            for part, given in enumerate(microbatches, start=-len(microbatches) - 1):
                self._trial.losses.part = part
                weight, (count, owners, records) = (1.0, given) if given else (0.0, (self._trial.copies, None, None))
                with piece():
                    records = records if given is None else loading.own(part, records)
                    step.streams.begin()
                    batch = self._host.training.stand_in(count) if given is None else self._trial.losses.move(records)
                    with step.microbatch(count, owners, weight=weight, further=True) as microbatch:
                        output = self._strategy.call_training_step(batch, *self._host.arguments)
                        loss = self._loss_of(output, count, further=True) if step.automatic else None
                        if loss is not None:
                            self.see_loss(loss)
                            self._host.back_propagate(loss, self._host.hooks.run)
                            self.backward_done()
                self._check_decisions(microbatch, counts)

    def _loss_of(self, output: Any, count: int, *, further: bool = False) -> Tensor | None:
        """Return the loss, or None if it is missing here or on any rank that has to run the same backward."""
        loss = self._host.loss_of(output, count)
        exists, ran = not self.step.reduction.any(loss is None), self._trial.written.batches[0]
        self._trial.decisions.see_loss(exists=exists, count=count, further=further, before=ran.numbers_back_in)
        return loss if exists else None

    def _check_decisions(self, microbatch: Microbatch, counts: Counts | None) -> None:
        """Read what a microbatch has shown, and check that records do not decide whether it has a loss and steps."""
        self._trial.losses.see_backward(microbatch)
        if counts is None:
            self._trial.decisions.check_loss()
        elif self.step.settings.check_per_sample:
            self._trial.decisions.check_steps(microbatch.collected, counts, further=microbatch.further)

    def _run_real(self, batch: Any, count: int, owners: Tensor | None = None, *, weight: float = 1.0) -> Any:
        """Run the only call of a logical batch with lasting effects; under automatic optimization, Lightning runs its
        backward.
        """
        step, automatic = self.step, self.step.automatic
        counts = None if automatic else Counts(self._strategy)
        divisor = self._trainer.accumulate_grad_batches if automatic else 1
        with ExitStack() as until_backward:
            microbatch = until_backward.enter_context(step.microbatch(count, owners, weight=weight, divisor=divisor))
            mutes = weight == 0.0 and step.reduction.world_size == 1
            with self._trial.losses.watching(count), self._logs.muted() if mutes else nullcontext():
                _lightning.set_batch_of_logs(self._trainer, batch, None if weight else 0)
                stops = self._host.hooks.watching_stops(self._strategy.module, "training_step")
                with self._logs.in_training_step(), stops:
                    output = self._strategy.call_training_step(batch, *self._host.arguments)
            if automatic:
                loss = self._loss_of(output, count)
                if loss is not None:
                    until_backward.pop_all()
                else:
                    until_backward.close()
                    self._check_decisions(microbatch, counts)
                    self._logs.say_no_loss(weight)
                    if output is None and step.reduction.world_size == 1:  # with more, Lightning raises an error
                        return None
                loss = checks.zero_loss(self._device) if loss is None else loss  # which Lightning can back-propagate
                return {**output, "loss": loss} if isinstance(output, Mapping) else loss
            step.leave_open()
        self._check_decisions(microbatch, counts)
        return output

    @torch.no_grad()
    def losses(self, records: Sequence[Any], loss: Callable[[Any, Any], Tensor]) -> list[float]:
        """Return the loss of each record alone, in evaluation mode and without any effect. NOT private."""
        with self._sandbox.enter():
            self._strategy.module.eval()
            return [float(loss(self._strategy.module, self._host.training.batch_of([record]))) for record in records]

    def see_loss(self, loss: Tensor) -> None:
        """Read the form of a real loss that is about to be back-propagated."""
        if self.step.probe is None:  # else on trial
            self._trial.losses.see(loss)

    def check_new_loss(self) -> None:
        """Check a loss that is new or out of turn before its release; under manual optimization, this comes later."""
        if self.step.automatic and not self.on_trial:
            self._trial.decisions.check_loss()
            self._trial.losses.check()

    def backward_done(self) -> None:
        """Check the backward of a microbatch; under automatic optimization, clip it and add it to the sum."""
        step = self.step
        if step.recording is None:
            return
        step.backward_done()
        if step.automatic:
            step.collect(0)
            self._trial.losses.see_backward(microbatch := step.recording)
            if not microbatch.further:
                microbatch.__exit__(None, None, None)
