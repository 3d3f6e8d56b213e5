"""PrivateStep: one logical batch, from its first sample to a private gradient. Read ``collect`` and ``release`` first.

    begin        fixes masks, clipping bound and the Release from public state
    microbatch   the user's forward and backward; the engine records
    collect      per-sample norms -> factors -> weighted sum into the accumulator (``clipper.py``)
    release      ledger entry -> noise -> sum over ranks -> p.grad

From ``p.grad`` on, everything is post-processing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dp.clipping import Clipping
from lightning_dp.clipping.bounds import Bound
from lightning_dp.noise import GaussianNoise
from lightning_dp.per_sample import GradientEngine, SingleSampleEngine, make_engine
from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.sandbox.randomness import RandomStreams
from lightning_dp.step import checks
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.clipper import Clipper
from lightning_dp.step.correlation import check_position, check_releases
from lightning_dp.step.history import Trained
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.microbatch import Microbatch, end_all
from lightning_dp.step.noising import ReleaseNoise
from lightning_dp.step.observers import learn
from lightning_dp.step.parameters import PrivateParameters
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.release import Release
from lightning_dp.step.settings import Settings
from lightning_dp.step.settling import settle
from lightning_dp.step.state import PrivacyState


class PrivateStep:
    """The private step of one fit, which turns the samples of each logical batch into a private gradient.

    It uses torch, the pillars and a ``Reduction``, but not Lightning. Adapters call its methods in order.

    **Guarantee**: ``p.grad`` of a private parameter never holds a raw gradient; after ``release``

        p.grad = (sum_i u_i + N(0, noise_std^2 I)) / expected_batch_size,     ||u_i|| <= sensitivity

    and the ledger entry was written before. ``begin`` has fixed noise, masks and bounds in the ``Release``.

    Args:
        module: the user's module.
        optimizers: all optimizers, private and public ones.
        settings: the user's arguments.
        state: ledger, accountant and position; outlives this object.
        mechanisms: requests of callbacks.
        reduction: communication between processes.
        noise: draws the noise; outlives this object, so that no stream begins twice.
        automatic: whether the host back-propagates the loss and steps the one optimizer itself.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        settings: Settings,
        state: PrivacyState,
        mechanisms: Mechanisms,
        reduction: Reduction,
        noise: GaussianNoise,
        automatic: bool = True,
    ) -> None:
        self.module, self.optimizers = module, list(optimizers)
        self.settings, self.state, self.mechanisms = settings, state, mechanisms
        self.reduction, self.automatic, self.takes_own_losses = reduction, automatic, settings.per_sample_loss
        self._clipper = Clipper(self)
        seed = None if settings.seed is None else settings.seed * 1_000_003 + reduction.rank
        self.noise = ReleaseNoise(noise, reduction, seed)
        self.clipping: Clipping = settings.make_clipping()
        self.engine: GradientEngine = make_engine(
            module,
            grad_sample=settings.grad_sample,
            memory="lean" if reduction.is_sharded else settings.memory,  # "fast" may cache whole gradients
            alone=self.runs_samples_alone,
        )
        self.streams = RandomStreams(seed)
        self.parameters = PrivateParameters(module, self.optimizers, settings.public_optimizers)
        self.releases: dict[int, Release] = {}
        self.bound: Bound = mechanisms.bound
        self.recording: Microbatch | None = None
        self.probe: Any = None  # a trial under way, which takes the gradients where an optimizer would step
        self.unfinished: set[int] = set()  # optimizers that hold backprops of an earlier training_step
        self.unchecked_public, self.seen_backprops = set[int](), False
        self._trained = Trained(module)
        self.engine.attach()
        self._refresh()
        num = len(self.accumulators)
        mechanisms.check(self.clipping, target_epsilon=settings.target_epsilon, num_private_optimizers=num)
        if settings.noise is not None:
            check_releases(automatic=automatic, num_private_optimizers=num, shares_noise=self.clipping.shares_noise)

    @property
    def accumulators(self) -> dict[int, Accumulator]:
        """Accumulators by index of their private optimizer."""
        return self.parameters.accumulators

    @property
    def plan(self) -> Any:
        """The public plan of the run."""
        return self.state.plan

    @property
    def runs_samples_alone(self) -> bool:
        """True if every microbatch has one sample, so that plain autograd gives its gradient."""
        return self.settings.runs_samples_alone or (self.settings.may_run_alone and self.state.runs_alone)

    def run_alone(self) -> None:
        """Run samples one at a time from here on; a resumed run does so too."""
        self.state.note_alone(chosen=False)
        self.engine.detach()
        self.engine = SingleSampleEngine(self.module)
        self.engine.attach()
        self._refresh()

    # ---------------------------------------------------------------- the step, in the order of the data

    def begin(self, *, first_of_pass: bool, position: int | None = None) -> None:
        """Begin a logical batch: determine its releases, masks and clipping bound from public state.

        Args:
            first_of_pass: whether a pass over the data begins with this batch.
            position: number of the batch in the order of the data; needed for correlated noise only.
        """
        self.reduction.settle()
        self.state.begin_step()
        if self._trained.was_loaded():
            self.state.check_history(self.module)
        correlation, step = self.plan.correlation, self.state.step
        if correlation is not None:
            check_position(position, step)
        self.noise.follow(correlation, step)
        self._refresh()
        self.bound, self.releases = settle(self.accumulators, self.mechanisms, self.plan, step, self.noise.since)
        self._clipper.begin()
        self.streams.begin()
        self.mechanisms.canaries.begin(self.plan.sample_rate)
        for accumulator in self.accumulators.values():
            accumulator.reset()
            if self.automatic:
                accumulator.drop_grads()
        if (first_of_pass if correlation is None else step == 0) and self.settings.sampling != "poisson":
            self.state.ledger.start_pass()

    def microbatch(
        self,
        count: int,
        owners: Tensor | None = None,
        *,
        weight: float = 1.0,
        divisor: int = 1,
        further: bool = False,
    ) -> Microbatch:
        """Return a context manager for the user's forward and backward on some records."""
        return Microbatch(self, count, owners, weight, divisor, further)

    def backward_done(self) -> None:
        """Check, after a backward, that every use of a private parameter was recorded."""
        if self.recording is not None:
            self.seen_backprops = True
            self.engine.check_tracked()

    @torch.no_grad()
    def collect(self, optimizer: int = 0) -> None:
        """Clip each sample of the microbatch and add it to the sum of an optimizer."""
        if optimizer not in self.accumulators or self.recording is None:
            return
        accumulator, engine, recording = self.accumulators[optimizer], self.engine, self.recording
        with unfollowed():
            self._begin_sum(optimizer)
            if recording.weight == 0.0:  # the dummy sample of an empty batch must not even count
                self.reduction.accumulate(engine, None, accumulator)
            else:
                self._clipper.add(recording, accumulator)
            engine.discard(self.parameters.collected(optimizer))

    @torch.no_grad()
    def release(self, optimizer: int = 0) -> None:
        """Write the ledger entry, add the missing noise, sum over ranks and set ``p.grad``."""
        accumulator, release = self.accumulators[optimizer], self.releases[optimizer]
        canaries = self.mechanisms.canaries
        self.reduction.settle()
        self.state.check_budget()
        checks.check_settled(accumulator.sensitivity, release.sensitivity)
        self._begin_sum(optimizer)
        self._clipper.finish(accumulator)
        canaries.join(optimizer, accumulator, self.bound, adds=self.reduction.rank == 0)
        self.mechanisms.diagnostics.summarise(accumulator.gradient, release.noise_std)
        self.state.record(release.sigma)
        self.noise.add(accumulator, release)
        self.reduction.reduce(accumulator)
        canaries.observe(optimizer, accumulator, accumulator.gradient, release.noise_std)
        rescale = learn(self.bound, accumulator, self.reduction, release, self.plan.expected_batch_size)
        self._trained.carry(optimizer, accumulator.parameters, self.state.ledger)
        accumulator.write_grads(accumulator.gradient, self.plan.expected_batch_size, rescale)
        accumulator.clear_rows(self.reduction.known_to_all(self.engine.padding_rows))
        self.engine.accept_grads(accumulator.names)

    def finish(self, optimizer: int) -> None:
        """Give an optimizer its gradient: private; averaged over ranks if it is public; on trial, a made-up one."""
        if self.intercept(optimizer):
            return
        if optimizer in self.settings.public_optimizers:
            checks.check_tried(optimizer, self.unchecked_public)
            self.reduction.average(self.parameters.of(optimizer))
            return
        self.check_grads(optimizer)
        if optimizer in self.accumulators:
            self.collect_if_manual(optimizer)
            self.release(optimizer)

    def intercept(self, optimizer: int) -> bool:
        """Take the gradient of an optimizer that would step in a trial or in a further microbatch.

        Returns:
            True if the gradient was taken, so that the optimizer must not step.
        """
        if self.probe is not None:
            self.probe.collect(optimizer)
            return True
        if self.recording is None or not self.recording.further:
            return False
        if optimizer in self.accumulators:
            self.collect_if_manual(optimizer)
        for parameter in self.parameters.of(optimizer).values():  # the number of microbatches is private:
            parameter.grad = None  # a public optimizer sees the gradient of the real call alone
        return True

    def collect_if_manual(self, optimizer: int) -> None:
        """Clip a microbatch when its optimizer steps, under manual optimization."""
        if self.automatic or self.recording is None:
            return
        checks.check_counts_once(
            optimizer,
            unfinished=optimizer in self.unfinished,
            again=self.recording.further and optimizer in self.recording.collected,
            microbatch_size=1 if self.runs_samples_alone else self.settings.microbatch_size,
        )
        self.recording.collected.append(optimizer)
        self.engine.take_written(self.accumulators[optimizer].names)
        self.collect(optimizer)

    def discard(self, optimizer: int) -> None:
        """Forget the backprops of an optimizer, as its ``zero_grad`` does."""
        self.unfinished.discard(optimizer)
        self.parameters.forget(self.parameters.names(optimizer))
        if self.probe is not None:
            self.probe.discard(optimizer)
        elif self.recording is not None:
            self.engine.discard(self.parameters.names(optimizer))

    def check_grads(self, optimizer: int) -> None:
        """Check that no raw gradient is left when an optimizer is about to step."""
        known = self.accumulators[optimizer].parameters if optimizer in self.accumulators else {}
        checks.check_no_raw_gradients(optimizer, self.optimizers[optimizer], known, self.module)

    def check_released(self) -> None:
        """Raise PrivacyError, at the end of a fit, if backprops arrived and no private optimizer has stepped."""
        checks.check_released(seen_backprops=self.seen_backprops, released=self._trained.released)

    def leave_open(self) -> None:
        """Record, at the end of a manual ``training_step``, the optimizers that hold backprops."""
        self.unfinished |= {index for index, acc in self.accumulators.items() if self.engine.has_backprops(acc.names)}

    def close(self) -> None:
        """Record the trained values, and remove all hooks from the module."""
        self._trained.close()
        end_all(self.recording)
        self.engine.end()
        self.engine.detach()

    def _refresh(self) -> None:
        """Update the parameters after layers were frozen or unfrozen."""
        make, num_statistics = self.reduction.make_accumulator, self.mechanisms.bound.num_statistics
        watched = self.parameters.refresh(lambda parameters: make(parameters, self.clipping, num_statistics))
        self.reduction.watch(self.engine, watched)

    def noise_comes_first(self) -> bool:
        """Tell whether a sum may begin with its noise: not if secure noise rounds the sum, or diagnostics read it."""
        return not (self.settings.secure_rng or self.mechanisms.diagnostics.reads_sums)

    def _begin_sum(self, optimizer: int) -> None:
        """Prepare the accumulator of an optimizer before its first sample, with noise if noise comes first."""
        accumulator = self.accumulators[optimizer]
        seen = self.bound.sees_releases or self.mechanisms.canaries.reads_sums or not accumulator.clipping.gives_mean
        divisor = 1 if seen else self.plan.expected_batch_size
        self.noise.begin(accumulator, self.releases[optimizer], first=self.noise_comes_first(), divisor=divisor)
