"""ForeignCode: runs the user's step on trial, and handles its exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from lightning_dp import _messages
from lightning_dp.errors import PrivacyError

if TYPE_CHECKING:
    from lightning_dp.trials.host import Host

T = TypeVar("T")


_SMALL = "a batch holds one record: Poisson sampling draws such batches where batches are small."
_SIZES = ". Private batches vary in size, so the step must run on any number of records"


class OneAloneError(Exception):
    """An error of the user's step on one record alone; ``__cause__`` is the original exception."""


class ForeignCode:
    """A wrapper of a host that adds the number of records to each exception of the user's step.

    If a step cannot run on one record (a metric over two records, a ``squeeze`` that drops the batch axis), it runs on
    two copies of the record. The mean over two copies is the loss of the record itself; a sum is halved. Where training
    runs each record alone, the step runs twice on the record instead: a hook at an epoch's end sees two batches.

    Args:
        host: the object that runs the step.
        reduction: returns "mean" or "sum": how a scalar loss combines the samples.
        runs_alone: whether training itself runs each record alone, so that copies would hide an error.
    """

    def __init__(self, host: Host, *, reduction: Callable[[], str], runs_alone: bool) -> None:
        self._host, self._reduction, self.runs_alone = host, reduction, runs_alone
        self._ran_one = False
        self.copies = 1
        """Number of copies that replace a single record in a run, or of runs where training runs it alone."""
        self.by_column = False
        """Whether draws differ along their last axis, because equal ones give no finite gradient."""

    def __getattr__(self, name: str) -> Any:
        if name == "_host":  # a copy being built has no state yet
            raise AttributeError(name)
        return getattr(self._host, name)

    def run(self, records: list[Any]) -> Any:
        """Run the step on records, or on copies of a single record.

        Raises:
            OneAloneError: the step raised on one record.
        """
        with self._naming(records) as chosen:
            for _ in range(self.copies - 1 if self.runs_alone and len(records) == 1 else 0):
                self._host.run(chosen)
            return self._host.run(chosen)

    def begin(self, records: list[Any]) -> None:
        """Begin a batch of the same records before the step of an optimizer, within which they run."""
        with self._naming(records) as chosen:
            self._host.begin(chosen)

    @contextmanager
    def _naming(self, records: list[Any]) -> Iterator[list[Any]]:
        """Yield the records that run, and add their number to an exception."""
        copies = self.copies if len(records) == 1 else 1
        chosen = records if self.runs_alone or copies == 1 else records * copies
        self._ran_one = copies * len(records) == 1
        try:
            yield chosen
        except Exception as error:
            if (cause := cause_of(error)) is not None:
                raise cause from cause.__cause__
            if len(chosen) == 1 and not self.runs_alone:
                raise OneAloneError from error
            may_be_size = isinstance(error, (RuntimeError, ValueError))  # as shapes raise
            why = ", as training runs it" if self.runs_alone else _SIZES if may_be_size else ""
            note(
                error,
                "lightning_dp had called the training step on trial, without effect, with "
                f"{_named(len(chosen), len(records))}{why}.",
            )
            raise

    def end_epoch(self) -> None:
        """Call the user's hooks between two epochs.

        Raises:
            OneAloneError: a hook raised after a run on one record, such as a metric over two that it computes.
        """
        try:
            self._host.end_epoch()
        except PrivacyError as error:
            if self._ran_one and error.__cause__ is not None:
                raise OneAloneError from error.__cause__
            raise

    def loss_of(self, output: Any, count: int) -> Tensor | None:
        """Return the loss of an output as a scalar; a summed loss of copies is divided by their number."""
        loss = self._host.loss_of(output, count)
        if loss is None or count > 1 or self._reduction() == "mean":
            return loss
        return loss / self.copies

    def attempt(self, check: Callable[[], T], put_back: Callable[[], None]) -> T:
        """Run a check and return its answer; if a record cannot run alone, repeat the check with two copies of it.

        Args:
            check: function that runs the step.
            put_back: restores the state after a run that raised.
        """
        try:
            return check()
        except OneAloneError as alone:
            put_back()
            self.copies, raised = 2, alone.__cause__
        _messages.info(
            f"The training step or a hook raised {type(raised).__name__} on one record alone ({str(raised)[:200]}), so "
            f"the checks run it {'twice' if self.runs_alone else 'on two copies'}. Training raises, too, if "
            f"{'an epoch has one batch.' if self.runs_alone else _SMALL}"
        )
        return check()


def cause_of(error: BaseException | None) -> PrivacyError | None:
    """Return the PrivacyError that user code raised, perhaps as the cause of an exception of its own."""
    while not (error is None or isinstance(error, PrivacyError)):
        error = error.__cause__ or error.__context__
    return error


def note(error: BaseException, text: str) -> None:
    """Add a sentence to an exception; Python shows it below the message from version 3.11 on."""
    notes: list[str] = getattr(error, "__notes__", [])
    error.__notes__ = [*notes, text]


def _named(num: int, num_records: int) -> str:
    if num > num_records:
        return f"{num} copies of one record"
    return f"{num} records" if num > 1 else "1 record"
