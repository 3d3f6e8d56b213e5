"""Decisions of user code about steps and about the end of a run, and gradients of public optimizers, none of which may
depend on the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_dp.errors import PrivacyError
from lightning_dp.sandbox.randomness import seed_generators
from lightning_dp.sandbox.sandbox import Sandbox
from lightning_dp.trials import made_records
from lightning_dp.trials.draws import Draws
from lightning_dp.trials.probe import Probe
from lightning_dp.trials.runs import TrialRuns
from lightning_dp.trials.turns import Turns

if TYPE_CHECKING:
    from lightning_dp.trials.written import Begin

#: Records from all over the training set for the checks after the first ones.
NUM_FEW = 3
#: Values of a record's numbers that give an uncommon loss: those of few records may be on one side of a threshold.
_EXTREMES = (0.0, 1e6)
_STOPS = (
    "Expected user code to set trainer.should_stop whatever the records are, got it set for a batch and not for one "
    "record alone. The number of steps would depend on the data: let counts, the clock or validation figures decide."
)


class Decisions:
    """A set of checks that user code decides about single records as it has decided about a batch.

    Args:
        runs: run the user's step.
        sandbox: undoes the effects of the user's code.
    """

    def __init__(self, runs: TrialRuns, sandbox: Sandbox) -> None:
        self._runs, self._sandbox, self._step, self._host = runs, sandbox, runs.step, runs.host
        self._turns, self._losses = Turns(), Turns()
        self._unexpected: tuple[bool, int, Begin] | None = None  # whether a loss exists, its records, the counters

    def see_loss(self, *, exists: bool, count: int, further: bool, before: Begin) -> None:
        """Read whether a microbatch has a loss, on all processes alike.

        Args:
            exists: whether it has one.
            count: number of its records.
            further: whether another microbatch of the batch follows.
            before: makes a context in which counters and numbers of the module have their values from before the batch.
        """
        expected = bool(self._losses.expected([0]))
        if not further:
            self._losses.note([0] if exists else [])
        if exists != expected:
            self._unexpected = exists, count, before

    def check_loss(self) -> None:
        """Check, if ``training_step`` gave no loss for a batch, or one out of turn, that it does likewise on single
        samples.

        Raises:
            PrivacyError: it does not, so whether a sample counts depends on the samples around it.
        """
        if self._unexpected is None:
            return
        (exists, count, before), self._unexpected = self._unexpected, None
        if not self._step.reduction.any(count > 1):
            return
        answers = "None", "a loss"
        for record in self._host.records(NUM_FEW):
            with before(), self._sandbox.enter() as snapshot:
                seed_generators(0)
                output = self._host.attempt(partial(self._host.run, [record]), snapshot.put_back)
                if self._step.reduction.any((output is not None) != exists):
                    raise PrivacyError(
                        f"Expected training_step to return None for every sample or for none, got "
                        f"{answers[exists]} for a batch and {answers[not exists]} for one sample alone. "
                        "One sample could switch off all others, or switch them on: let batch_idx or a count decide, "
                        "or return the loss (a sample that is not finite contributes zero anyway)."
                    )

    def check_end_of_epoch(self) -> None:
        """Check that user code, which skipped the rest of an epoch, does so on single records too.

        Raises:
            PrivacyError: it does not, so the number of steps would tell something about the records.
        """
        if not self._step.settings.check_per_sample:
            return
        for record in self._host.records(NUM_FEW):
            with self._sandbox.enter():
                if not self._host.skips_on(record):
                    raise PrivacyError(
                        "Expected on_train_batch_start to skip the rest of an epoch whatever the records are, got -1 "
                        "for a batch and another answer for one record alone. The number of steps would depend on the "
                        "data: let counts or the weights decide."
                    )

    def check_stop(self, counts: Any) -> None:
        """Check, where user code has asked for the end of the run, that it does so whatever the records are.

        Args:
            counts: context manager that gives public counters the values of before the batch.

        Raises:
            PrivacyError: it does not, so the number of steps would tell something about the records.
        """
        if not self._step.settings.check_per_sample:
            return
        records = self._host.records(NUM_FEW)
        extremes = made_records.extremes(records[0], _EXTREMES)
        for number, record in enumerate([*records, *extremes]):
            try:
                stops = any(self._stops(record, partial(counts, after=after)) for after in (False, True))
            except Exception:
                if number < len(records):
                    raise
                continue  # the user's code refuses such a record
            if not stops:
                raise PrivacyError(_STOPS)

    def _stops(self, record: Any, counts: Any) -> bool:
        """Tell whether the run ends after a batch of one record, with these public counters."""

        def run() -> None:
            self._runs.run([record], Draws(real=True), engine=False)
            self._host.end_epoch()

        with counts(), self._sandbox.enter() as snapshot:
            self._host.attempt(run, snapshot.put_back)
            return bool(self._host.stops)

    def check_steps(self, real: Sequence[int], counts: Any, *, further: bool = False) -> None:
        """Check that private optimizers step on single samples as on a batch, unless they go on by turns.

        Args:
            real: private optimizers that stepped, in order.
            counts: ``back_in`` makes a context in which public counters have their values from before the batch;
                ``decided`` lists steps of optimizers that were checked from them, of other microbatches.
            further: whether another microbatch of the batch follows.

        Raises:
            PrivacyError: other optimizers step on a single sample, so whether noise is released depends on the samples.
        """
        private = self._step.accumulators.keys()
        real, expected = tuple(real), self._turns.expected(private)
        if not further:
            self._turns.note(real)
        if not self._step.reduction.any(real != expected and real not in counts.decided):
            return
        rehearses = self._step.automatic  # there the host decides, within its optimizer_step
        records = self._host.records(NUM_FEW)
        with counts.back_in(), self._sandbox.series(is_trial=True) as piece:

            def run(record: Any) -> list[int]:
                with piece():
                    return self._runs.run([record], Draws(real=True), engine=False, rehearses=rehearses).stepped

            decided = [self._host.attempt(partial(run, record), lambda: None) for record in records]
        for found in decided:
            stepped = tuple(optimizer for optimizer in found if optimizer in private)
            if self._step.reduction.any(stepped != real):
                raise PrivacyError(
                    f"Expected private optimizers to step whatever the samples are, got steps of {[*real]} on a "
                    f"batch and of {[*stepped]} on one sample alone. One sample could switch off all others: let "
                    "batch_idx or a count decide when to step (a sample that is not finite contributes zero anyway)."
                )
        counts.decided.append(real)

    def check_public(self) -> None:
        """Check that a public optimizer's gradient depends neither on the records nor on their number.

        An optimizer that did not step in this trial stays unchecked, and its real steps are refused until a later trial
        has stepped it.

        Raises:
            PrivacyError: the gradient changes.
        """
        records = self._host.records(NUM_FEW)
        found: list[Probe] = []
        for chosen in (records[:1], records[1:2], records):
            with self._sandbox.enter():
                chosen = chosen * 2 if len(chosen) == 1 else chosen
                found.append(self._runs.run(chosen, Draws(by_place=True), engine=False))
        positions = self._step.settings.public_optimizers
        for other, what in (
            (found[1], "which samples are in the batch"),
            (found[2], "how many samples the batch holds"),
        ):
            for name, gradient in found[0].public.items():
                bound = 1e-5 * (1e-8 + float(gradient.abs().max()))
                if name not in other.public or float((gradient - other.public[name]).abs().max()) > bound:
                    raise PrivacyError(
                        f"Expected the gradients of public_optimizers={positions!r} to be free of the data, got one "
                        f"for {name!r} that changes with {what}. Leave the optimizer out of public_optimizers, or keep "
                        "data and batch size out of its loss (a generator draws a fixed number of fakes for its own "
                        "step)."
                    )
        self._step.unchecked_public -= {*found[0].stepped}
