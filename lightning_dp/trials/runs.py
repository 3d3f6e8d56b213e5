"""TrialRuns: runs of the user's step on a few records, without effect."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_dp.errors import ComparisonError, PrivacyError
from lightning_dp.per_sample.frozen_randomness import UnfrozenDrawError
from lightning_dp.sampling import LogicalBatch
from lightning_dp.sandbox.randomness import host_generators, seed_generators, seeds, torch_generators
from lightning_dp.sandbox.readings import Readings
from lightning_dp.sandbox.sandbox import Sandbox
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.step.step import PrivateStep
from lightning_dp.system.local import local_part
from lightning_dp.trials.draws import Draws
from lightning_dp.trials.exchanged import Exchanged
from lightning_dp.trials.foreign import ForeignCode
from lightning_dp.trials.host import Host
from lightning_dp.trials.loss_form import LossForm
from lightning_dp.trials.probe import Probe

_DRAWS = (
    "draws by Python's random or numpy within the step, of which a record gets other ones where another record asks "
    "for more (draw by torch; if it is no more than that, grad_sample='single' runs each record alone)"
)
#: Seconds after which the checks show their progress.
SILENT_FOR = 3.0


class _Bar(tqdm):  # type: ignore[misc]
    """A progress bar without tqdm's monitoring thread, which would outlive the fit."""

    monitor_interval = 0


class TrialRuns:
    """A runner of the user's step on records within the sandbox.

    Args:
        step: the private step.
        host: runs the user's code.
        sandbox: undoes the effects of the user's code.
    """

    def __init__(self, step: PrivateStep, host: Host, sandbox: Sandbox) -> None:
        self.step, self.sandbox, host.layers = step, sandbox, step.parameters.layers
        alone = step.settings.runs_samples_alone
        self.host = ForeignCode(host, reduction=lambda: step.state.loss_reduction, runs_alone=alone)
        self.loss_form = LossForm()
        self.exchanged: Exchanged | None = None
        """A real batch, and what becomes of it by an exchange that changes values of other records in a new way."""
        self.has_coins = False
        """True if user code has drawn values in any run that another coin would change."""
        self.draws_on_host = False
        """True if user code has drawn from the generators of Python or numpy, whose draws differ from row to row."""
        self.used = set[str]()
        """Names of the private parameters that got a gradient in any run without the engine."""
        self.stepped = set[int]()
        """Optimizers that would have stepped in any run."""
        self.raised_on: list[Any] = []
        """Records of the last run that raised."""
        self._draws: bool | None = None  # whether user code has drawn by torch in any run; None before the first
        self._seeded: dict[tuple[int, float], tuple[Any, Any]] = {}  # by seed and coin: generators of torch, and others
        self.look: Callable[[], Any] = lambda: None  # at what user code may write, see ``Look``
        self._is_narrow = False  # whether gradients have flowed through numbers of 16 bits in any run
        self._bar: Any = None

    @property
    def narrow(self) -> torch.dtype:
        """Narrowest floating-point dtype in which the step computes."""
        is_narrow = self._is_narrow or torch.bfloat16 in self.step.engine.dtypes
        return torch.bfloat16 if is_narrow else self.host.narrow

    def coarsest(self, dtypes: Iterable[torch.dtype]) -> torch.dtype:
        """Return the type by whose rounding gradients are compared: float64 if all have it, else ``narrow``."""
        return torch.float64 if set(dtypes) == {torch.float64} else self.narrow

    def scale(self, count: int) -> int:
        """Return the factor from gradients of the loss of ``count`` samples to gradients of each sample's own loss."""
        return count if self.step.state.loss_reduction == "mean" else 1

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Show the number of finished runs if they take longer than a few seconds; remove the bar at the end."""
        with _Bar(
            desc="Checking on a few records that samples are independent",
            unit=" runs",
            delay=SILENT_FOR,
            leave=False,
            disable=not self.host.shows_progress,
        ) as self._bar:
            try:
                yield
            finally:
                self._bar = None

    @contextmanager
    def naming_draws(self) -> Iterator[None]:
        """Name draws by Python's or numpy's generators as the first cause of a difference that a check finds."""
        try:
            yield
        except ComparisonError as error:
            if self.draws_on_host:
                before, causes, after = str(error).partition("Likely causes: ")
                error.args = (f"{before}Likely causes: {_DRAWS}{'; ' + after if causes else '.'}",)
            raise

    def transfer(self, batch: LogicalBatch) -> Any:
        """Move the last microbatch to the device, and watch, now and then, what mixes its records on the way."""
        given, move = batch.microbatches[-1][1], self.host.training.move
        if self.step.runs_samples_alone or not self.step.settings.check_per_sample:
            return move(given)
        with Readings() as readings, self.loss_form.watching():
            moved = move(given)
        batch.read[-1] |= readings.take()
        if batch.exchanged is not None:
            self._see_exchanged(batch.exchanged)
        return moved

    def take_exchanged(self) -> Exchanged | None:
        """Return ``exchanged``, once."""
        found, self.exchanged = self.exchanged, None
        return found

    def _see_exchanged(self, found: Exchanged) -> None:
        """Read which values of a real batch, moved as hooks do, change with another record."""
        try:
            moved = copy.deepcopy([found.real, found.other])
        except Exception:  # such a batch cannot run twice
            return
        alone = self.step.reduction.world_size == 1  # else ranks would have to agree on a run
        if self.host.has_transfer and alone:
            with self.sandbox.enter() as snapshot:
                for number, batch in enumerate(moved):
                    seed_generators(0)
                    moved[number] = self.host.training.move(batch)
                    snapshot.put_back()
        is_new = self.loss_form.see_spread(found.but(real=moved[0], other=moved[1]).spread())
        self.exchanged = found if is_new and alone else self.exchanged

    def again(
        self, snapshot: Snapshot, records: list[Any], draws: Draws, *, engine: bool = False, read: Any = None
    ) -> Probe:
        """Run the step on records, and restore the state; several runs share one sandbox."""
        try:
            if draws.moved or draws.far:
                private = (each.parameters.values() for each in self.step.accumulators.values())
                draws.move(map(local_part, chain.from_iterable(private)))
            return self.run(records, draws, engine=engine, read=read)
        except Exception:
            self.step.reduction.recover()
            self.raised_on = records
            raise
        finally:
            snapshot.put_back()

    @property
    def must_freeze(self) -> bool:
        """True unless user code has run without any draw of torch's, so that freezing draws has no effect."""
        unread = torch.accelerator.is_available() and not torch.cuda.is_available()  # the state of its generator
        return self._draws is not False or self.step.reduction.world_size > 1 or unread

    def run(
        self,
        records: list[Any],
        draws: Draws,
        *,
        engine: bool,
        read: Any = None,
        rehearses: bool = False,
        freezes: bool = True,
    ) -> Probe:
        """Run the step on records within a sandbox that is entered already.

        Args:
            records: of the batch.
            draws: random draws.
            engine: whether the per-sample engine records.
            read: what is taken from the engine.
            rehearses: whether private optimizers step too, each on a gradient that does not depend on the records.
            freezes: whether draws are frozen: frozen ones cost a call per operation, also where there are none.

        Raises:
            UnfrozenDrawError: there were draws that were not frozen.
        """
        step, probe = self.step, Probe(self.step, engine=engine, read=read, rehearses=rehearses)
        outputs: list[Any] = []
        # that samples are independent, where the weights are those of training
        is_check = not (rehearses or draws.far) and self.step.state.step == self.loss_form.checked_at
        frozen, begun = draws.begin(len(records), by_column=self.host.by_column), (draws.seed, draws.coin)
        before = self._seeded[begun] = self._seeded.get(begun) or (torch_generators(), host_generators())
        freezing = frozen if freezes else nullcontext()

        def forward_backward() -> Any:
            with torch.enable_grad(), freezing:  # an optimizer may call its closure without gradients
                with self.loss_form.watching(checked=True) if is_check else nullcontext():
                    output, loss = self.host.run(records), None
                outputs.append(output)
                if self.loss_form.shown.compares:
                    self.loss_form.shown.see(step, checked=True)
                on_host, probe.seeds = host_generators(), seeds()
                probe.drawn = torch_generators(), on_host
                self.draws_on_host |= on_host != before[1]
                drew = (frozen.drew and not draws.real) or self.draws_on_host
                self.has_coins = step.reduction.any(self.has_coins or drew)
                if step.automatic:
                    loss = self._backward(output, len(records), is_check=is_check)
            if step.automatic:  # the engine draws nothing, and the mode would slow down its operations
                if engine:
                    step.engine.check_tracked()
                step.reduction.settle()
            return loss

        with ExitStack() as stack:
            stack.enter_context(probe.attached())
            stack.enter_context(step.reduction.on_trial(None if rehearses else draws))
            if engine:
                stack.enter_context(step.microbatch(len(records)))
            if rehearses and step.automatic:
                with torch.enable_grad(), freezing:
                    self.host.begin(records)
                probe.take_thawed()
                self.host.rehearse(forward_backward)
                probe.keep_raw(0)
            else:
                forward_backward()
                if step.automatic:
                    probe.collect(0)
            if self.loss_form.shown.compares:  # what the backward has read, and rules of the user's own
                self.loss_form.shown.see(step, checked=True)
            with freezing:
                self.host.end_batch(outputs[-1] if outputs else None)
        self.used |= probe.used
        self.stepped.update(probe.stepped)
        self._note_draws(frozen.has_draws if freezes else torch_generators() != before[0], were_frozen=freezes)
        self._is_narrow |= frozen.is_narrow
        if frozen.communicated:
            self._check_communication()
        if self._bar is not None:
            self._bar.update()
        return probe

    def _note_draws(self, found: bool, *, were_frozen: bool) -> None:
        self._draws = self._draws or found
        if found and not were_frozen:
            raise UnfrozenDrawError

    def rehearse(self, records: list[Any], *, is_later: bool, freezes: bool) -> Probe:
        """Run the step with its optimizers, in the same draws as each other time.

        Args:
            records: of the batch.
            is_later: whether counters have gone on; if these are beyond the run, those of before the trial are taken.
            freezes: see :meth:`run`.
        """
        used, run = self.used.copy(), partial(self.run, records, Draws(rates=True), engine=False, rehearses=True)
        try:
            return run(freezes=freezes)
        except Exception as error:
            if not is_later or isinstance(error, (PrivacyError, UnfrozenDrawError)):
                raise
            self.host.stay()
            return run(freezes=freezes)
        finally:
            self.used = used if is_later else self.used

    def _check_communication(self) -> None:
        """Refuse collectives of user code that ranks would call a different number of times."""
        step = self.step
        if (
            step.reduction.is_sharded
            or step.reduction.world_size == 1
            or not (step.runs_samples_alone or step.settings.microbatch_size)
        ):
            return
        raise PrivacyError(
            "Expected no collective of torch.distributed in user code that runs once per microbatch, got one. Ranks "
            "draw different numbers of microbatches, so they would wait for each other, or add what does not belong "
            "together. Log with sync_dist=True, call self.all_gather, or leave microbatch_size out."
        )

    def _backward(self, output: Any, count: int, *, is_check: bool) -> Tensor | None:
        loss = self.host.loss_of(output, count)
        if loss is not None and not loss.requires_grad:
            loss = None
        if not self.step.reduction.any(loss is None) and loss is not None:
            if is_check:
                self.loss_form.see(loss, checked=True)
            self.host.backward(loss)
        return None if loss is None else loss.detach()
