"""Real losses: what user code does on real batches that no check has seen, and the checks of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Set
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import num_operations
from lightning_dp.per_sample.owners.batch_reading import shapes_in
from lightning_dp.sampling.batches import LogicalBatch
from lightning_dp.sandbox.readings import Readings
from lightning_dp.sandbox.sandbox import Sandbox
from lightning_dp.step.microbatch import Microbatch
from lightning_dp.system.torch_private import num_hooks
from lightning_dp.trials.in_batches import check_in_batch
from lightning_dp.trials.runs import TrialRuns
from lightning_dp.trials.vanishing import compare
from lightning_dp.trials.written import Ran, Written

RELEASED = (
    "User code did something new in the step before this one, which was released: its epsilon does not hold for the "
    "weights of now. Take those of an earlier checkpoint."
)


Sizes = dict[tuple[int, int], int]
"""Sizes of the rows of a batch: by the number of the tensor, and that of the axis."""


class RealLosses:
    """A watch of the losses of real microbatches, and the checks before their gradients are released.

    A loss of a new form makes all checks due. The records of each microbatch that shows something new then also run
    alone, because those of a regular check may not be the ones that user code goes by. So do the records of a loss that
    counts its rows by new factors, and those of a new form in a step that began with regular checks. So do those of a
    batch whose rows are longer or shorter than all before, because one long record pads the rows of all others, and of
    one from which user code reads new values (``Readings``), by which it may choose what becomes of all others.

    Args:
        runs: run the user's step.
        written: checks what user code writes.
        sandbox: undoes the effects of the user's code.
        check_again: repeats the checks, given the logical step and the positions of real records.
    """

    def __init__(
        self, runs: TrialRuns, written: Written, sandbox: Sandbox, check_again: Callable[[int, list[int]], None]
    ) -> None:
        self._runs, self._step, self._written, self._sandbox = runs, runs.step, written, sandbox
        self._check_again, self._begins = check_again, True
        self._positions: list[list[int]] = []
        self._sizes: list[Sizes] = []  # of each microbatch
        self._read: list[set[Any]] = []  # values that user code has read before the forward of each microbatch
        self._ranges: dict[tuple[int, int], tuple[int, int]] = {}  # of these sizes so far
        self._seen_in: tuple[list[int], Ran | None] = [], None  # of the newest loss
        self._new_in: list[tuple[list[int], Ran | None]] = []  # of those that have shown something new
        self._num_new = 0, 0  # things that are new by now: factors and others
        self.part = -1
        """Number of the microbatch that runs, from the last one."""

    def begin_pass(self) -> None:
        """Watch the calls of the next batch in any case."""
        self._begins = True

    def begin(self, batch: LogicalBatch, *, read: Set[Any] = frozenset()) -> None:
        """Begin a batch; positions of the records of each microbatch are noted as far as they are known.

        Args:
            batch: item of the private loader.
            read: values that hooks have read of its last microbatch.
        """
        positions = self._positions = batch.positions
        self._read = [*batch.read[:-1], *(found | read for found in batch.read[-1:])]
        self._sizes = [_sizes_of_rows(part, count) for count, _, part in batch.parts]
        self.part, self._step.engine.joined = -1, batch.joined
        self._written.begin(positions, batch.changed)
        if batch.changed and self._runs.loss_form.has_written:  # records of one microbatch alone may have set it
            self._new_in += [(each, self._written.batches[0]) for each in positions]

    def move(self, records: Any) -> Any:
        """Move a further microbatch to the device, and note the values that user code reads on the way."""
        move, step = self._runs.host.training.move, self._step
        if step.runs_samples_alone or not step.settings.check_per_sample:
            return move(records)
        with Readings() as readings:
            moved = move(records)
        if -self.part <= len(self._read):
            self._read[self.part] |= readings.take()
        return moved

    def note_sizes(self, records: list[Any]) -> None:
        """Take note of the sizes of rows that the first checks see.

        Args:
            records: those that were compared with themselves alone.
        """
        collate = self._runs.host.training.collated
        for record in records:
            [*self._beyond(_sizes_of_rows(collate([record] * 2), 2))]

    def _beyond(self, sizes: Sizes) -> Iterator[tuple[Hashable, int]]:
        """Extend the ranges of sizes; yield each size that was beyond, and its power of two."""
        for place, size in sizes.items():
            least, most = self._ranges.get(place, (size + 1, 0))
            if not least <= size <= most:
                self._ranges[place] = min(least, size), max(most, size)
                yield place, size
                yield ("power", place), size.bit_length()

    @contextmanager
    def watching(self, count: int) -> Iterator[None]:
        """Watch what user code writes on a real batch, and now and then its calls, see ``LossForm``."""
        self.part, form, step = -1, self._runs.loss_form, self._step
        if not step.settings.check_per_sample:
            yield
            return
        always, self._begins = self._begins or form.checked_at == step.state.step, False
        calls = nullcontext() if step.runs_samples_alone else form.watching(count, always=always)
        self._written.watch.begin_forward()
        with calls:
            yield
        self._written.watch.end_forward()

    def see(self, loss: Tensor) -> None:
        """Read the form of a real loss, before its backward."""
        step, form = self._step, self._runs.loss_form
        recording = step.recording
        if not step.settings.check_per_sample or step.runs_samples_alone or recording is None:
            return
        self._note_new(factors_only=True)  # those of the loss before
        positions = self._positions[self.part] if -self.part <= len(self._positions) else []
        self._seen_in = positions, self._written.batches[0]
        count = recording.count if recording.weight and recording.count > 1 else 0
        if count and recording.further:
            self._written.watch.read_aside()
        operations, before = num_operations() - recording.began, num_hooks()
        hooks = before - recording.num_hooks
        form.see(loss, checked=False, num_operations=operations, count=count, num_hooks=hooks)
        recording.num_hooks += num_hooks() - before  # those of the watch itself are not the user's
        if count:
            if -self.part <= len(self._sizes):
                form.shown.sizes.see(self._beyond(self._sizes[self.part]))
                form.shown.readings.see(self._read[self.part])
            form.shown.see(step)
        self._note_new()

    def see_backward(self, microbatch: Microbatch) -> None:
        """Read the values that user code has read since the newest loss was seen: in hooks, in the backward of a
        ``torch.autograd.Function``, or in a registered rule.
        """
        checks = self._step.settings.check_per_sample and not self._step.runs_samples_alone
        if checks and microbatch.weight and microbatch.count > 1:
            self._runs.loss_form.shown.readings.see(microbatch.readings.take())
            self._note_new()

    def _note_new(self, *, factors_only: bool = False) -> None:
        """Take note of the records of the newest loss if something is new since the loss before."""
        form, (factors, others) = self._runs.loss_form, self._num_new
        form.factors.read_new()
        self._num_new = form.factors.num_new, others if factors_only else form.num_new
        if (self._num_new[0] > factors or self._num_new[1] > others) and self._seen_in not in self._new_in:
            self._new_in.append(self._seen_in)

    def check(self, *, at_end: bool = False) -> None:
        """Check a loss that is new on any of several processes. Before a release and between accumulated batches, or,
        under manual optimization, before the next step or the end.

        Raises:
            PrivacyError: as in ``Trial.prepare``.
        """
        form, step, number = self._runs.loss_form, self._step, self._step.state.step
        agree, exchanged = step.reduction.agree, self._runs.exchanged
        since = 100 if at_end else number - form.checked_at
        begins = since == 0  # this step began with a check, but of other records
        self._note_new()
        (positions, ran), *_ = new_in = self._new_in or [(self._written.batches[0].positions, None)]
        ran, self._new_in = ran or self._written.batches[0], []
        if not agree(form.is_due(since, number) or (begins and form.is_new)):
            return
        try:
            if agree(form.has_written or form.shown.readings.is_new):
                self._written.check(number, agree)
            with self._written.watch.aside(), ran.numbers_back_in():
                if everything := agree(form.has_new_calls if begins else form.has_new_operations):
                    self._check_again(number, positions)
                checked = self._check_in_batches([each for each, _ in new_in], number, form.factors.places)
                form.factors.settle(number, checked=checked)
                form.shown.settle(number)
                form.settle(by_check=everything or not begins)
                self._num_new = 0, form.num_new
        except PrivacyError as error:
            if (step.automatic and not form.was_released) or exchanged:  # before a release, also by manual steps
                raise
            raise PrivacyError(f"{error} {RELEASED}") from error

    def _check_in_batches(self, microbatches: list[list[int]], number: int, places: list[int]) -> bool:
        """Compare the records of microbatches with the same records alone; return whether there were any to compare.

        Args:
            microbatches: positions of their records. Ranks may have different numbers of them; other records run in
                place of one that is missing, because user code may communicate.
            number: of the logical step.
            places: of records to compare in any case, within the last of these microbatches.
        """
        reduction, found = self._step.reduction, False
        if self._step.runs_samples_alone or reduction.is_sharded:
            return False
        waiting = [positions for positions in microbatches if len(positions) > 1]
        while reduction.agree(bool(waiting)):
            found, host = True, self._runs.host
            with self._sandbox.enter() as snapshot, self._runs.progress():
                records = host.read(waiting.pop(0)) if waiting else host.records(2, seed=number)
                options: Any = {"seed": number, "agree": reduction.agree, "places": () if waiting else places}
                compare(self._runs, snapshot, records, partial(check_in_batch, self._runs, records=records, **options))
        return found


def _sizes_of_rows(batch: Any, count: int) -> Sizes:
    """Return the sizes of the tensors of a collated batch, but for the axis of the records: one of the first two."""
    return {
        (number, axis): size
        for number, shape in enumerate(shapes_in(batch))
        if count in shape[:2]
        for axis, size in enumerate(shape[1:] if shape[0] == count else shape[:1] + shape[2:])
    }
