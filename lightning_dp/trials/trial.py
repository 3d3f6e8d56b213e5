"""Trial: runs the user's step on a few records in the sandbox, to infer the batch axis of every layer, and to check
that samples are independent, and that neither the steps of an optimizer nor state depend on them.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from lightning_dp import _messages
from lightning_dp.errors import ComparisonError, PrivacyError
from lightning_dp.per_sample.notices import late_notices
from lightning_dp.sandbox.sandbox import Sandbox
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.step.microbatch import own_losses
from lightning_dp.step.step import PrivateStep
from lightning_dp.trials import state_runs
from lightning_dp.trials.branches import Branches
from lightning_dp.trials.chosen_records import differing, shape_of
from lightning_dp.trials.comparisons import Comparisons
from lightning_dp.trials.couplings import NUM_ALONE, Couplings
from lightning_dp.trials.decisions import NUM_FEW, Decisions
from lightning_dp.trials.draws import HIGH, LOW, MIDDLE, Draws
from lightning_dp.trials.host import Host
from lightning_dp.trials.own_loading import OwnLoading
from lightning_dp.trials.ranks import check_ranks, elsewhere
from lightning_dp.trials.real_losses import RealLosses
from lightning_dp.trials.runs import TrialRuns
from lightning_dp.trials.vanishing import compare
from lightning_dp.trials.ways import OneByOne
from lightning_dp.trials.written import Written

#: Sizes at which the layout is learned; both are made of the same two samples, so that padded lengths agree.
LAYOUT_SIZES = (2, 3)
#: Records from all over the training set for the checks before the first step.
NUM_SPREAD = 9
#: First steps of which some are tried on a record beforehand while some private parameters are unused.
NUM_TRIED = 16


class Trial:
    """Trial runs of the user's step on a few records, without lasting effect, and checks of their results.

    Args:
        step: the private step.
        host: runs the user's code.
        sandbox: undoes the effects of the user's code.
    """

    def __init__(self, step: PrivateStep, host: Host, sandbox: Sandbox) -> None:
        self._runs = TrialRuns(step, host, sandbox)
        self._couplings = Couplings(self._runs)
        self._comparisons = Comparisons(self._runs, self._couplings)
        self._one_by_one = OneByOne(self._runs, self._couplings)
        self._branches = Branches(self._runs)
        self._step, self._host, self._sandbox = step, self._runs.host, sandbox
        self.decisions = Decisions(self._runs, sandbox)
        self._checked_at, self._prepared_at, self.transfer = 0, 0, self._runs.transfer
        self.written = Written(self._runs, sandbox)
        self.loading = OwnLoading(host)
        self.losses = RealLosses(self._runs, self.written, sandbox, self.check_again)

    @property
    def copies(self) -> int:
        """Number of copies of a record that the user's step needs in order to run on one record."""
        return 1 if self._host.runs_alone else self._host.copies

    def is_due(self, number: int, *, first_of_pass: bool) -> bool:
        """Tell whether to repeat the checks: at logical steps 2, 10 and 100; later at the first step of an epoch 1,000
        steps after the last check, and at any step 10,000 after it.

        Args:
            number: number of the logical step, from 0.
            first_of_pass: whether a pass over the data begins with this step.
        """
        since = number - self._checked_at
        return since > 0 and (number in (1, 9, 99) or since >= (1_000 if first_of_pass else 10_000))

    def prepare(self) -> None:
        """Infer the layout, and check on records from all over the training set that samples are independent.

        Where rules cannot follow the module, and samples are independent, they run one at a time from here on. A loss
        that proves to be a sum over the batch is read as one, see ``OneByOne.find_sum``.

        Raises:
            PrivacyError: a sample's gradient depends on another sample, or state depends on the samples.
        """
        settings, step = self._step.settings, self._step
        self._begin_checks(step.state.step)
        self._prepared_at = step.state.step
        records = self._host.records(NUM_SPREAD)
        if len(records) == 1:
            _messages.info(
                "The training set has one record, which the guarantee hides as a whole. Nodes of a graph and times of "
                "a series are no records: make each part that it should hide by itself a record of its own."
            )
        checks = settings.check_per_sample and len(records) > 1
        begins_run = step.state.steps_taken == 0  # else the reading of the first step stays
        if begins_run:
            step.state.note_sum(found=False)
        with self._sandbox.enter() as snapshot, self._runs.progress(), self._runs.naming_draws():
            try:
                self._prepare(snapshot, records, checks=checks)
            except ComparisonError:
                if not (begins_run and checks and self._one_by_one.find_sum(snapshot, records)):
                    raise
                self._prepare(snapshot, records, checks=checks)
            if checks:
                self.losses.note_sizes(differing(records)[:NUM_ALONE])
        self._take_note()
        if checks:
            step.unchecked_public = set(settings.public_optimizers)
            self._say_differences()

    def _say_differences(self) -> None:
        """Tell the user which private parameters got no gradient in any run of the checks, or have hooks."""
        private = {n: p for index in self._step.accumulators for n, p in self._step.parameters.of(index).items()}
        for notice in late_notices(private, self._sizes_of(self._runs.stepped), self._runs.used):
            _messages.info(notice)

    def _sizes_of(self, optimizers: Collection[int]) -> dict[str, int]:
        """Return the number of entries of the private parameters of some optimizers, by name."""
        if self._step.reduction.is_sharded:  # a rank may hold no entry of a parameter
            return {}
        return {
            name: parameter.numel()
            for optimizer in self._step.accumulators.keys() & optimizers
            for name, parameter in self._step.parameters.of(optimizer).items()
        }

    def _prepare(self, snapshot: Snapshot, records: list[Any], *, checks: bool) -> None:
        if not self._step.runs_samples_alone:
            error = self._learn_layout(snapshot, records)
            if error is None and self._step.settings.per_sample_loss and not checks:
                error = PrivacyError("One record is too little to compare its loss in a batch with its own.")
            self._choose(snapshot, records, error)
        if checks:
            self._host.attempt(lambda: self._check(snapshot, records), snapshot.put_back)

    def _begin_checks(self, number: int, *, public: bool = True) -> None:
        """Check that ranks agree, and that an item is the same whatever else is read.

        Args:
            number: of the logical step.
            public: whether public state alone asked for the checks; else no later check may shift.
        """
        self._checked_at = number if public else self._checked_at
        self._runs.loss_form.checked_at = number
        check_ranks(self._step, self._host)
        if self._step.settings.check_per_sample:
            self._host.check_reading(number)

    def _take_note(self) -> None:
        """Record in the privacy state why samples are treated as independent."""
        settings, state = self._step.settings, self._step.state
        if self._step.runs_samples_alone:
            state.note_alone(chosen=settings.runs_samples_alone)
        elif not settings.check_per_sample:
            state.note_kept_apart("taken as said (check_per_sample=False)")
        else:
            state.checked_steps.append(state.step)

    def _learn_layout(self, snapshot: Snapshot, records: list[Any], *, more: bool = False) -> PrivacyError | None:
        """Infer the layout, also with low and high coins if user code draws any, which may select other layers.

        Args:
            snapshot: of the state before the runs.
            records: from all over the training set.
            more: whether to keep what was inferred before.

        Returns:
            Why rules cannot follow the module, or None.
        """
        pair = (differing(records) * 2)[:2]  # records that differ show whether all of them have as many rows

        def run(draws: Draws, size: int) -> None:
            with own_losses(self._step, size):
                self._runs.again(snapshot, (pair * size)[:size], draws)

        def learn(draws: Draws) -> None:
            self._step.engine.learn_layout(
                partial(run, draws),
                sizes=LAYOUT_SIZES,
                more=more or draws.coin != MIDDLE,
                alike=shape_of(pair[0]) == shape_of(pair[1]),
            )

        try:
            learn(Draws())
            if self._runs.has_coins:
                learn(Draws(coin=LOW))
                learn(Draws(coin=HIGH))
        except PrivacyError as error:
            return error
        return None

    def _check(self, snapshot: Snapshot, records: list[Any]) -> None:
        state_runs.check_state(self._runs, snapshot, records)
        if self._step.runs_samples_alone:
            if self._step.settings.check_per_sample and self._step.settings.runs_samples_alone:
                self._one_by_one.say_if_coupled(snapshot, records)
            return
        error: PrivacyError | None = None
        try:
            self._comparisons.check(snapshot, records)
        except ComparisonError as differing_ones:
            sorts, own = self._host.training.order.is_followed, self._step.takes_own_losses
            if not (own or sorts or self._one_by_one.spreads_penalties):
                raise
            error = differing_ones
        except PrivacyError as unfollowed:
            error = unfollowed
        if self._choose(snapshot, records, error):
            self._check(snapshot, records)

    def _choose(self, snapshot: Snapshot, records: list[Any], error: PrivacyError | None) -> bool:
        if self._branches.learn(snapshot, error, partial(self._learn_layout, snapshot, more=True)):
            return True
        return self._one_by_one.choose(snapshot, records, error, partial(self._learn_layout, snapshot, records))

    def repeat(self, number: int, *, first_of_pass: bool) -> None:
        """Repeat the checks if they are due; so are they if a step is about to use parameters for the first time.

        Args:
            number: of the logical step, from 0.
            first_of_pass: whether a pass over the data begins with this step.

        Raises:
            PrivacyError: as in :meth:`prepare`.
        """
        is_due = self.is_due(number, first_of_pass=first_of_pass)
        since = number - self._prepared_at
        early = since < NUM_TRIED  # counters choose among optimizers or layers, or a weight that has left zero does
        if ((is_due or first_of_pass or early) and self._finds_use()) or is_due:
            self.check_again(number, None if is_due else [])

    def _finds_use(self) -> bool:
        """Run one record if some private parameters are unused; infer the layout again if it uses one of them.

        Counters or weights may have led to another branch than before the first step.
        """
        step, runs = self._step, self._runs
        if step.runs_samples_alone or step.reduction.is_sharded or not step.settings.check_per_sample:
            return False
        unused = self._sizes_of(step.accumulators).keys() - runs.used
        if not step.reduction.agree(bool(unused)):
            return False
        records = self._host.records(NUM_SPREAD)
        with self._sandbox.enter() as snapshot, runs.progress():
            self._host.attempt(lambda: runs.again(snapshot, records[:1], Draws()), snapshot.put_back)
            found = step.reduction.agree(not unused.isdisjoint(runs.used))
            error = self._learn_layout(snapshot, records, more=True) if found else None
            if step.reduction.agree(error is not None):
                raise error or elsewhere()
        return found

    def check_again(self, number: int, positions: list[int] | None = None) -> None:
        """Repeat the checks of state and of one exchange, because user code may take another branch later.

        Args:
            number: of the logical step.
            positions: of the records of a real batch, one of which one process exchanges, if the data may have asked
                for the check; none of them for other records. Default: other records, at a public step.

        Raises:
            PrivacyError: as in :meth:`prepare`.
        """
        self._begin_checks(number, public=positions is None)
        if not self._step.settings.check_per_sample:
            return
        if positions is None:  # else the data asked for the check, and the statement carries no noise
            self._take_note()
        self._step.unchecked_public = set(self._step.settings.public_optimizers)
        self.written.check_state(number, later=1)  # what begins to keep more writes in a new way, which is checked
        if self._step.settings.runs_samples_alone:
            return
        with self._sandbox.enter() as snapshot, self._runs.progress(), self._runs.naming_draws():
            if not self._step.runs_samples_alone:
                records = self._couplings.real_records(number)
                self._one_by_one.check_sum(snapshot, records)
                self._comparisons.check_again(snapshot, records, positions, number=number)
            chosen = self._step.runs_samples_alone or self._step.takes_own_losses
            if chosen and not self._step.settings.per_sample_loss:
                records = self._host.records(NUM_FEW + 1, seed=number)
                compare(self._runs, snapshot, records, partial(self._one_by_one.check, records, seed=number))

    def begin_pass(self) -> None:
        """Check, where users or the noise rely on positions, that the records are where they were in the last pass."""
        self.losses.begin_pass()
        settings = self._step.settings
        if settings.records_per_unit is not None or settings.noise is not None:
            self._host.check_order()
