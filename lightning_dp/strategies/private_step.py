"""The private step: the only place that draws noise and writes ``p.grad``.

Read it as the data goes: ``batch_to_device`` (what was sampled) -> ``training_step`` (one forward and one backward a
microbatch) -> ``_collect`` (noise where it comes first, norms, clipping, sum) -> ``_release`` (ledger, noise that is not there
yet, sum over ranks, ``p.grad``) -> optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp.clipping import NoClipping
from lightning_dp.clipping.base import SMALLEST_FACTOR
from lightning_dp.clipping.bounds import Bound, NoisyRelease
from lightning_dp.errors import PrivacyError
from lightning_dp.noise import has_spare_core
from lightning_dp.sampling import LogicalBatch, collate_samples, private_dataloader
from lightning_dp.step.accumulator import ClippedSum
from lightning_dp.step.diagnostics import Diagnostics
from lightning_dp.strategies import first_batch, skipped_steps, trainer_checks
from lightning_dp.strategies.refusals import Refusals


class PrivateStep(Refusals):
    """The step of a private run, as a mixin over a Lightning strategy; see ``PrivateRun`` for the arguments."""

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Replaces the training loader by one that draws logical batches; every other loader passes as it is."""
        trainer = self._trainer
        if not (trainer.state.fn == TrainerFn.FITTING and trainer.state.stage == RunningStage.TRAINING):
            return dataloader
        trainer_checks.check_single_loader(trainer)
        loader = private_dataloader(
            dataloader,  # type: ignore[arg-type]
            sampling=self.settings.sampling,
            microbatch_size=self.settings.microbatch_size,
            accumulate=trainer.accumulate_grad_batches,
            rank=self.global_rank,
            world_size=self.world_size,
            seed=self.settings.seed,
            num_batches_kept=trainer_checks.batches_kept(trainer),
            extra_records=self.mechanisms.extra_records,
        )
        trainer_checks.check_same_dataset(self._loader, loader)
        if self._loader is not None and self._loader.facts != loader.facts:
            self._plan = None  # another batch size: another sample rate from here on
        self._loader = loader
        return loader

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Moves a batch; of a logical batch the last microbatch now, the others when they are used."""
        if not isinstance(batch, LogicalBatch):
            trainer_checks.check_not_nested(batch)
            return super().batch_to_device(batch, device, dataloader_idx)
        self._batch = batch
        self._on_device = self._to_device(batch.microbatches[-1][1] if batch else first_batch.empty_batch(self))
        return self._on_device

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward, backward and clipping of every microbatch; of the last one only the forward, the rest is Lightning's."""
        batch, self._batch = self._batch, None
        if batch is None:
            raise PrivacyError(
                "Expected one training_step for each logical batch, got a batch that the private loader did not draw, or the same "
                "one again. Optimizers that call their closure several times cannot be used: take SGD, Adam or AdamW."
            )
        try:
            return self._run_batch(batch, args[1:], kwargs)
        except StopIteration as error:  # Lightning would take it for the end of the data and go on without this step
            raise RuntimeError(
                "Expected training_step to return, got a StopIteration out of it. Catch it where it is raised."
            ) from error

    def _run_batch(self, batch: LogicalBatch, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._begins_logical_batch():
            self._begin_logical_batch(rest, kwargs)
        if not batch:
            return self._run_empty(rest, kwargs)
        *others, (count, _) = batch.microbatches
        for other_count, part in others:
            self._run_whole(self._to_device(part), other_count, rest, kwargs)
        return self._run_forward(self._on_device, count, rest, kwargs, divisor=self._trainer.accumulate_grad_batches)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """One backward of one microbatch; under automatic optimization its clipped sum is taken at once."""
        if closure_loss.dim() > 0:
            closure_loss = self._reduced(closure_loss)
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if self._recording:
            self._engine.check_tracked()
            if self._module.automatic_optimization:
                self._collect(0)
                self._end_microbatch()
        return loss

    @torch.no_grad()
    def _collect(self, index: int) -> None:
        """Clips each sample of this microbatch and adds it to the sum of optimizer ``index``."""
        sums, engine, scale = self._sums[index], self._engine, self._scale
        self._begin_sum(sums)
        if scale == 0.0:  # a stand-in for an empty batch: it must not even count
            engine.discard(sums.names)
            return
        threshold, diagnostics = self._threshold, self.mechanisms.diagnostics
        needs_norms = threshold.num_statistics > 0 or diagnostics.reads_sums
        if needs_norms or not sums.clipping.needs_gradients:
            norms = engine.squared_norms(sums.groups, sums.mask).sqrt() * scale
        if sums.clipping.needs_gradients:
            grads = engine.per_sample_gradients(sums.names)
            kept = sums.clipping.contributions(torch.cat([g.flatten(1) for g in grads.values()], 1) * scale, sums.live)
            sums.add(kept.sum(0))
        else:
            factors = sums.clipping.factors(norms)
            weights = factors * (scale / sums.divisor)
            weights = torch.where(weights >= SMALLEST_FACTOR, weights, 0.0)
            engine.accumulate(weights, sums.groups, sums.views, sums.mask, sums.places, sums.room)
        if threshold.num_statistics:
            sums.statistics.add_(threshold.statistics(torch.linalg.vector_norm(norms, dim=0)))
        if diagnostics.reads_sums:
            kept_norms = (
                torch.linalg.vector_norm(kept, dim=1)[None] if sums.clipping.needs_gradients else factors * norms
            )
            self._diagnose(diagnostics, sums, norms, kept_norms)
        engine.discard(sums.names)

    def _diagnose(self, diagnostics: Diagnostics, sums: ClippedSum, norms_GB: Tensor, kept_norms_GB: Tensor) -> None:
        """Un-noised figures, on request: the raw sum beside the clipped one."""
        raw = sums.gradient.new_zeros(sums.num_coordinates)
        ones = norms_GB.isfinite().all(0).to(norms_GB.dtype).repeat(len(sums.groups), 1)
        self._engine.accumulate(ones * self._scale, sums.groups, sums.views_of(raw))
        norms_B, kept_norms_B = (torch.linalg.vector_norm(norms, dim=0) for norms in (norms_GB, kept_norms_GB))
        diagnostics.add(raw if sums.live is None else raw[sums.live], norms_B, kept_norms_B)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Steps an optimizer on a gradient that is private before any ``on_before_optimizer_step`` hook sees it."""
        index = self.optimizers.index(optimizer)

        def private_closure() -> Any:
            output = closure()
            if index in self.settings.public_optimizers:
                self._refuse_unchecked(index)
                self._average_over_ranks(self._parameters_of(index))
                return output
            self._refuse_raw_gradients(index)
            if index in self._sums:
                self._collect_if_manual(index)
                self._release(index)
            return output

        if self._probe is not None:
            closure()
            return self._probe.collect(index)
        if self._deferring:
            closure()
            if index in self._sums:
                self._collect_if_manual(index)
            for parameter in self._parameters_of(index).values():  # how many microbatches there are is private:
                parameter.grad = None  # a public optimizer sees the last one's only
            return None
        return super().optimizer_step(optimizer, private_closure, model, **kwargs)

    @torch.no_grad()
    def _release(self, index: int) -> None:
        """Ledger, noise, sum over ranks, ``p.grad``: after this line everything is post-processing."""
        sums, plan = self._sums[index], self.plan
        self._refuse_over_budget()
        self._begin_sum(sums)
        self.mechanisms.canaries.join(index, sums, self._threshold, adds=self.global_rank == 0)
        payload, gradient, statistics = sums.payload()
        noise_std = self._add_noise(sums, gradient, statistics, self._sigma())
        self._sum_over_ranks(payload)
        self.mechanisms.canaries.observe(index, sums, gradient, noise_std)
        rescale = self._learn(sums, gradient, statistics, noise_std)
        sums.write_grads(gradient, plan.expected_batch_size, rescale)
        self._engine.accept_grads(sums.names)

    def _begin_sum(self, sums: ClippedSum) -> None:
        """Before anything is added: draws the noise of the release into the buffer, unless something has to see it without."""
        if sums.used:
            return
        sums.used = True
        noise_std, _ = self._noise_stds(sums, self._sigma())
        if noise_std > 0 and self._noise_comes_first():
            assert self._noise is not None
            sums.begin_with_noise(self._noise, noise_std * self._noise_share, self._divisor(sums))

    def _noise_comes_first(self) -> bool:
        """Not if secure noise rounds the sum, or diagnostics read it."""
        return not (self.settings.secure_rng or self.mechanisms.diagnostics.reads_sums)

    def _divisor(self, sums: ClippedSum) -> int:
        """What a sum that begins with its noise is divided by as it is made: 1 where something has to see the sum itself."""
        seen = self._threshold.sees_releases or self.mechanisms.canaries.reads_sums
        return 1 if seen or not sums.clipping.gives_mean else self.plan.expected_batch_size

    @property
    def _noise_share(self) -> float:
        """Each of W ranks adds noise of 1/W of the variance."""
        return 1 / math.sqrt(self.world_size)

    def _sigma(self) -> float:
        """Noise multiplier of one release of this logical step: k of them, one a private optimizer, cost what one does."""
        return self.plan.sigma(self._step) * math.sqrt(len(self._sums))

    def _noise_stds(self, sums: ClippedSum, sigma: float) -> tuple[float, float]:
        """Std of the noise on a coordinate of the gradient and on a statistic, over all ranks: public, settled with the batch."""
        plan = self.plan
        gradient_sigma, statistics_std = self._threshold.share_noise(sigma, plan.expected_batch_size)
        return gradient_sigma * plan.relation_factor * sums.sensitivity, statistics_std * plan.relation_factor

    def _add_noise(self, sums: ClippedSum, gradient: Tensor, statistics: Tensor, sigma: float) -> float:
        """Writes the release into the ledger and draws what its buffer lacks of the noise.

        Returns:
            The std of the noise on a coordinate of the gradient, over all ranks.
        """
        assert self._noise is not None
        noise_std, statistics_std = self._noise_stds(sums, sigma)
        self.mechanisms.diagnostics.summarise(gradient, noise_std)
        self._record(sigma)
        if sums.noise_std is None:
            self._noise.add_(gradient, noise_std * self._noise_share)
        elif sums.noise_std != noise_std * self._noise_share:
            self._refuse_changed_noise(sums.noise_std / self._noise_share, noise_std)
        if statistics.numel():
            self._noise.add_(statistics, statistics_std * self._noise_share)
        if noise_std > 0 and len(self._sums) == 1 and has_spare_core():  # of the next release, beside its forward
            self._noise.prepare(gradient.numel(), gradient.dtype, gradient.device)
        return noise_std

    def _learn(self, sums: ClippedSum, gradient: Tensor, statistics: Tensor, noise_std: float) -> float:
        """Shows the release to a bound that learns from it; returns what the gradient is multiplied by."""
        threshold = self._threshold
        if not threshold.sees_releases:
            return 1.0
        released = tuple(statistics.tolist())
        threshold.observe(
            NoisyRelease(
                squared_norm=float(torch.linalg.vector_norm(gradient.double())) ** 2,
                num_live=gradient.numel(),
                noise_std=noise_std,
                expected_batch_size=self.plan.expected_batch_size,
                statistics=released,
            )
        )
        return threshold.rescale(released)

    def _record(self, sigma: float) -> None:
        """One ledger entry a logical batch: further releases on the same batch add their precision to it."""
        first, planned = self._batch_precision == 0.0, self.plan.sigma(self._step)
        precision = self._batch_precision + (sigma**-2 if sigma > 0 else math.inf)
        combined = precision**-0.5
        if combined < planned * (1 - 1e-9):
            self._refuse_unplanned_release()
        self._batch_precision = precision
        sigma = planned if math.isclose(combined, planned, rel_tol=1e-9) else combined
        event = self.plan.event_of(sigma, self._step)
        if first:
            self.ledger.record(event)
        else:
            self.ledger.amend_last(event)

    def _begins_logical_batch(self) -> bool:
        """Whether the sums start afresh: where the loader begins to hand out a logical batch, and where Lightning has stepped.

        The two agree, but not after a resume from within an accumulation: the loader begins anew there. Parts of two logical
        batches must never be summed, since one sample may be in both.
        """
        index, parts = self._trainer.fit_loop.batch_idx, self._trainer.accumulate_grad_batches
        self._refuse_changed_accumulation(parts)
        if index == 0 or not self._prepared:
            self._part = 0
        begins = self._part == 0 or index % parts == 0
        self._part = (self._part + 1) % parts
        return begins

    def _begin_logical_batch(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._step = self.steps_taken
        self._batch_precision = 0.0
        self._refresh_parameters()
        self._settle()
        self.mechanisms.canaries.begin(self.plan.sample_rate)
        for sums in self._sums.values():
            sums.reset()
            if self._module.automatic_optimization:
                sums.drop_grads()
        if self.settings.sampling == "shuffle" and (self._trainer.fit_loop.batch_idx == 0 or not self._prepared):
            self.ledger.start_pass()
        if not (self._prepared and self._engine.has_layout):
            first_batch.prepare(self, rest, kwargs)
            self._prepared = True
        if self._unchecked_public:
            first_batch.check_public(self, rest, kwargs)

    def _settle(self) -> None:
        """Bounds and masks of this logical step, from public state: they hold until the next one begins."""
        mechanisms, step, plain = self.mechanisms, self._step, not self.plan.is_private(self._step)
        self._threshold = Bound() if plain else mechanisms.bound
        for sums in self._sums.values():
            base = NoClipping() if plain else sums.base
            sums.clipping = self._threshold.clipping(base, step, len(sums.groups))
        version = tuple(mask.version(step) for mask in mechanisms.masks)
        if all(sums.mask_version == version for sums in self._sums.values()):
            return
        parameters = {name: p for sums in self._sums.values() for name, p in sums.parameters.items()}
        masks = [mask.live(step, parameters) for mask in mechanisms.masks]
        for sums in self._sums.values():
            sums.set_masks(masks, version)

    def _run_forward(
        self,
        batch: Any,
        count: int,
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        divisor: int = 1,
        weight: float = 1.0,
    ) -> Any:
        """The user's ``training_step`` on one microbatch of ``count`` samples.

        Args:
            divisor: what Lightning will divide the loss by before its backward.
            weight: 0 makes the samples contribute exactly nothing.
        """
        automatic = self._module.automatic_optimization
        counts = None if automatic else skipped_steps.Counts.of(self)
        mean = self.settings.loss_reduction == "mean"
        self._scale = weight * (count if mean else 1) * (divisor if automatic else 1)
        self._begin_microbatch(batch, count, weight)
        with self._quiet(weight == 0.0 and self.world_size == 1):
            output = self._call_training_step(batch, rest, kwargs)
        if automatic:
            if output is None and count > 1:
                self._end_microbatch()
                skipped_steps.check_skip(self, rest, kwargs)
            return self._with_scalar_loss(output, count)
        self._unfinished |= {index for index, sums in self._sums.items() if self._engine.has_backprops(sums.names)}
        self._end_microbatch()
        if counts is not None and self.settings.check_per_sample and self._collected < self._sums.keys():
            skipped_steps.check_steps(self, rest, kwargs, counts)
        return output

    def _run_empty(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """No sample was drawn. Where the user's code steps by itself, or talks to other ranks, one that counts as nothing stands in."""
        if self._module.automatic_optimization and self.world_size == 1:
            return self._zero_loss()
        return self._run_forward(first_batch.stand_in(self), 1, rest, kwargs, weight=0.0)

    def _run_whole(self, batch: Any, count: int, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward, backward and clipping of a microbatch that is not the last: no optimizer steps on it."""
        with ExitStack() as stack:
            self._partial = True
            stack.callback(setattr, self, "_partial", False)
            if self._module.automatic_optimization:
                output = self._run_forward(batch, count, rest, kwargs)
                self.backward(output["loss"] if isinstance(output, dict) else output, None)
                return
            self._deferring = True
            stack.callback(setattr, self, "_deferring", False)
            for optimizer in self._lightning_optimizers:
                stack.enter_context(first_batch.without_progress(optimizer))
            self._run_forward(batch, count, rest, kwargs)

    def _call_training_step(self, batch: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._logs.in_training_step() if self._logs is not None else ExitStack():
            return super().training_step(batch, *rest, **kwargs)

    def _to_device(self, batch: Any) -> Any:
        """What Lightning's loop does to a batch before the step, for one microbatch."""
        module = self._module
        batch = self.precision_plugin.convert_input(batch)
        batch = type(module)._on_before_batch_transfer(module, batch, dataloader_idx=0)
        return super().batch_to_device(batch, self.root_device, 0)

    @torch.no_grad()
    def losses(self, records: Sequence[Any], loss: Callable[[pl.LightningModule, Any], Tensor]) -> list[float]:
        """Return the loss of each record alone, in evaluation mode and without any effect. NOT private.

        Args:
            records: as the training set holds them.
            loss: (module, batch of one record on the device) -> loss.
        """
        assert self._loader is not None
        with first_batch.held_still(self):
            self._module.eval()
            batches = (self._to_device(collate_samples(self._loader, [record])) for record in records)
            return [float(loss(self._module, batch)) for batch in batches]

    def _begin_microbatch(self, batch: Any, count: int, weight: float) -> None:
        results: Any = self._trainer._results
        results.batch, results.batch_size = batch, None if weight else 0  # where `self.log` reads the weight of a mean
        self._collected.clear()
        self._engine.begin(count)
        self._recording = True

    def _end_microbatch(self) -> None:
        self._engine.end()
        self._recording = False

    def _collect_if_manual(self, index: int) -> None:
        """Under manual optimization a microbatch is clipped when its optimizer steps."""
        if self._module.automatic_optimization:
            return
        self._refuse_counting_twice(index)
        self._collected.add(index)
        self._collect(index)

    def _with_scalar_loss(self, output: Any, count: int) -> Any:
        """The step's output with a loss that Lightning can back-propagate: None becomes a zero contribution."""
        loss = self._scalar_loss(output, count)
        if loss is None:
            self._end_microbatch()
            loss = self._zero_loss()
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def _sum_over_ranks(self, flat: Tensor) -> None:
        """Adds the buffers of all ranks; on one device there is one."""

    def _average_over_ranks(self, parameters: dict[str, nn.Parameter]) -> None:
        """Averages public gradients over ranks; on one device there is one."""

    @contextmanager
    def _quiet(self, active: bool) -> Iterator[None]:
        """Keeps a sample that counts as nothing out of the logs."""
        with first_batch.silent(self._module) if active else ExitStack():
            yield
