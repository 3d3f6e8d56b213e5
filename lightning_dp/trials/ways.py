"""The way in which samples run: together, by rules on operations, or one at a time, where no rule can follow."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dp import _messages
from lightning_dp.errors import ComparisonError, PrivacyError
from lightning_dp.per_sample.layout import CUSTOM, MISLED, PENALTY, REORDERED, TWICE
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.trials import chosen_records, exchange
from lightning_dp.trials.couplings import NUM_ALONE, TOLERANCE, Couplings
from lightning_dp.trials.draws import HIGH, LOW, MIDDLE, Draws
from lightning_dp.trials.foreign import OneAloneError
from lightning_dp.trials.ranks import elsewhere
from lightning_dp.trials.runs import TrialRuns
from lightning_dp.trials.vanishing import compare

_COUPLED = (
    "The gradient of a batch is not that of its records alone, so samples influence each other (statistics over the "
    "batch, a contrastive loss, a shared denominator, a penalty that a sum over the batch counts once). One record at "
    "a time would train another objective without a word. Change the layer or the loss so that each sample has its "
    "own; where samples share no more than a denominator, per_sample_loss=True counts each record's own loss."
)


class OneByOne:
    """A choice to run samples one at a time, made where no rule can follow the module and nothing else changes by it.

    **Guarantee**: samples run one at a time only if, on records from all over the training set,

        B grad(mean loss of a batch)  =  sum_i grad(loss of record i alone)

    within rounding: for a few records, again with one of them exchanged and under low and high coins, and for the
    difference that one exchanged record makes in a batch of the real size. So no coupling of samples becomes another
    objective silently. The choice is the same on every rank; it is noted in the state, so that a resumed run keeps it.

    With the same check, a penalty on weights that is added to the mean of a loss first counts evenly for all samples.
    If that is not enough, records keep their own losses in one batch (``OwnLosses``), if rules can follow that: a
    weight that multiplies the mean of a loss then meets the losses of the records.

    Args:
        runs: run the user's step.
        couplings: choose the records of a real batch.
    """

    def __init__(self, runs: TrialRuns, couplings: Couplings) -> None:
        self._runs, self._couplings = runs, couplings
        self._cost, self._copies = 1.0, 1  # training would run the record itself alone
        self._reason: PrivacyError | None = None  # why rules could not follow the step as it is
        self.spreads_penalties = False
        """Whether the engine spreads a penalty over the samples, which samples run alone must confirm."""

    def choose(
        self,
        snapshot: Snapshot,
        records: list[Any],
        error: PrivacyError | None,
        learn: Callable[[], PrivacyError | None],
    ) -> bool:
        """Run samples by their own losses or one at a time from here on if an error was raised; else go on by rules.

        Args:
            snapshot: of the state before the runs.
            records: from all over the training set.
            error: why rules cannot follow the step as it is, or None.
            learn: infers the layout; returns why rules cannot follow the step, or None.

        Returns:
            True if rules follow the step in another way from here on, which must be checked: each record has its own
            loss in a batch, or rows have owners.

        Raises:
            PrivacyError: samples influence each other, or cannot run alone.
        """
        step = self._runs.step
        if not step.reduction.agree(error is not None):
            return False
        reason = self._reason or error or elsewhere()
        is_sorted = step.reduction.agree(REORDERED in str(reason) or step.settings.per_sample_loss)
        if is_sorted and step.reduction.agree(self._runs.host.training.follow_order()):
            return True
        misled = step.takes_own_losses or any(each in str(reason) for each in MISLED)
        misled = step.reduction.agree(misled) and not step.reduction.is_sharded
        if misled and step.engine.prefer_owners():
            unfollowed = learn()
            if not step.reduction.agree(unfollowed is not None):
                return True
            reason = (unfollowed or elsewhere()) if step.settings.per_sample_loss else reason
        is_twice = step.reduction.agree(TWICE in str(reason)) and not step.reduction.is_sharded
        if is_twice and step.engine.differentiate_twice() and not step.reduction.agree(learn() is not None):
            return True
        is_hidden = step.reduction.agree(CUSTOM in str(reason)) and not step.reduction.is_sharded
        is_new = is_hidden and step.reduction.agree(step.engine.replay_functions())  # on one rank alone, maybe
        if is_new and not step.reduction.agree(learn() is not None):
            return True
        if not step.settings.may_run_alone or step.reduction.is_sharded:
            raise reason
        if step.settings.per_sample_loss:  # the loss of a record alone is the objective
            self._run_alone()
            _messages.info(f"Each record runs alone: its own loss could not be had from a batch. {_public(reason)}")
            return False
        may_help = step.reduction.agree(PENALTY in str(reason))
        alone, coupled = self._compare_with_singles(snapshot, records, reason)
        if step.reduction.agree(alone is not None) and may_help:  # samples need not run alone in training then
            self._copies = 2
            _, coupled = self._compare_with_singles(snapshot, records, reason)
        else:
            coupled = coupled or alone
        if step.reduction.agree(coupled is not None):
            raise (coupled or ComparisonError(f"{reason} {_COUPLED}")) from reason
        if may_help and step.settings.check_per_sample and step.engine.spread_penalties():
            self.spreads_penalties, self._reason = True, reason
            if not step.reduction.agree(learn() is not None):
                return True
        if may_help and not step.takes_own_losses and step.settings.checks_own_losses:
            step.takes_own_losses, self._reason = True, reason
            if not step.reduction.agree(learn() is not None):
                return True
        step.takes_own_losses = False
        if self._copies > 1:  # on every rank
            raise (alone or reason) from reason
        size = self._runs.host.batch_size
        self._run_alone()
        _messages.info(
            f"Samples run one at a time, through plain autograd. {_public(reason)} Nothing but the time changes: a "
            f"batch of {size} takes about {self._cost:.1f} times as long as in one piece, as measured on this machine. "
            "grad_sample='single' takes this way without a trial, grad_sample='rules' raises an error instead."
        )
        return False

    def _compare_with_singles(
        self, snapshot: Snapshot, records: list[Any], reason: PrivacyError
    ) -> tuple[PrivacyError | None, PrivacyError | None]:
        """Return why a record cannot run alone, and why samples are coupled; None where that is not so."""
        try:
            compare(self._runs, snapshot, records, partial(self.check, records, seed=0, first=True))
        except OneAloneError as alone:
            return PrivacyError(f"{reason} Nor can a record run alone: {alone.__cause__}"), None
        except ComparisonError as found:
            return None, ComparisonError(f"{reason} {found}")
        return None, None

    def find_sum(self, snapshot: Snapshot, records: list[Any]) -> bool:
        """Read a scalar loss as a sum over the batch if it proves to be one and ``loss_reduction`` is "auto".

            grad(loss of a batch)  =  sum_i grad(loss of record i alone)

        **Guarantee**: the reading changes neither sensitivity nor noise, because each sample is clipped under either
        one. It is made before the first release, where the run would be refused otherwise, from an identity of the loss
        that holds on all records; so it tells no more of them than that the run was not refused. All later checks hold
        the loss to it, in resumed runs too.

        Args:
            snapshot: of the state before the runs.
            records: from all over the training set.

        Returns:
            True if the loss is read as a sum from here on, by all ranks.
        """
        step = self._runs.step
        if step.settings.loss_reduction != "auto" or step.state.loss_reduction == "sum":
            return False
        step.state.note_sum(found=True)
        found = self._adds_up(snapshot, records)
        if step.reduction.agree(False in found or True not in found):
            step.state.note_sum(found=False)
            return False
        _messages.info(
            "The loss is a sum over the batch, as a comparison with records run alone shows, so each record's own loss "
            "counts, as with loss_reduction='sum'. Private gradients are divided by the expected batch size as ever."
        )
        return True

    def check_sum(self, snapshot: Snapshot, records: list[Any]) -> None:
        """Check that a loss that was found to be a sum over the batch still is one.

        Raises:
            ComparisonError: it is not.
        """
        step = self._runs.step
        found = step.settings.loss_reduction == "auto" and step.state.loss_reduction == "sum"
        if found and step.reduction.agree(False in self._adds_up(snapshot, records)):
            raise ComparisonError(
                "Expected the loss to stay the sum over a batch that it was before the first step, got another one. "
                "Gradients would be too small or too large: use one reduction in all steps."
            )

    def _adds_up(self, snapshot: Snapshot, records: list[Any]) -> list[bool | None]:
        coins = (MIDDLE, LOW, HIGH) if self._runs.has_coins else (MIDDLE,)
        few = chosen_records.differing(records)[:NUM_ALONE]
        return [self._couplings.adds_up(snapshot, few, Draws(seed=1, coin=coin)) for coin in coins]

    def say_if_coupled(self, snapshot: Snapshot, records: list[Any]) -> None:
        """Say that each record's own loss counts, where records run alone as the user asked and the loss of a batch is
        neither the sum nor the mean of their losses: that is another objective, under the same guarantee.

        Args:
            snapshot: of the state before the runs.
            records: from all over the training set.
        """
        step, few = self._runs.step, chosen_records.differing(records)[:NUM_ALONE]
        if step.settings.per_sample_loss or step.reduction.world_size > 1 or len(few) < 2:
            return
        try:
            adds_up = self._couplings.adds_up(snapshot, few, Draws(seed=1), (1.0, float(len(few))))
        except Exception:  # the module takes single records only
            return
        if adds_up is False and not self._runs.draws_on_host:  # numpy and Python draw others for a record alone
            _messages.info(
                "Each record's own loss counts, because records run one at a time (grad_sample='single' or "
                "microbatch_size=1). The loss of a batch is another one: its gradient is not made of those of its "
                "records alone. A contrastive loss has no negatives then, and mixup no partners."
            )

    def _run_alone(self) -> None:
        self._runs.step.run_alone()
        self._runs.host.runs_alone = True

    def check(self, records: list[Any], snapshot: Snapshot, *, seed: int, first: bool = False) -> None:
        """Check that the gradient of a batch is that of its records run alone.

        Args:
            records: from all over the training set.
            snapshot: of the state before the runs.
            seed: chooses the records of a batch of the real size.
            first: whether gradients that are all zero are too little to tell; later they may be, as of a hinge loss.

        Raises:
            ComparisonError: it is not, or there is too little to tell.
        """
        few = chosen_records.differing(records)[: NUM_ALONE + 1]
        if len(few) < 2:
            raise ComparisonError(f"{len(few)} record is too little to tell whether samples influence each other.")
        shown = [self._check_batch(snapshot, few[:NUM_ALONE], MIDDLE)]
        if len(few) > NUM_ALONE:
            shown.append(self._check_batch(snapshot, [*few[1:NUM_ALONE], few[-1]], MIDDLE))
        for coin in (LOW, HIGH) if self._runs.has_coins else ():
            shown.append(self._check_batch(snapshot, few[:NUM_ALONE], coin))
        self._check_exchange(snapshot, self._couplings.real_records(seed), seed)
        if first and not any(shown):
            raise ComparisonError("Gradients that are all zero are too little to tell whether samples are independent.")

    def _check_batch(self, snapshot: Snapshot, records: list[Any], coin: float) -> bool:
        draws = Draws(seed=1, coin=coin)
        together, _ = self._gradient(snapshot, records, draws)
        alone = [self._gradient(snapshot, [record], draws)[0] for record in records]
        return _check_sum(alone, together, self._runs.coarsest(gradient.dtype for gradient in together.values()))

    def _check_exchange(self, snapshot: Snapshot, records: list[Any], seed: int) -> None:
        """Exchange the first record of a batch of the real size: its own two gradients alone must explain what
        changes.
        """
        host, draws = self._runs.host, Draws(seed=seed)
        dtype = self._runs.narrow if torch.float64 not in self._runs.step.engine.dtypes else torch.float64
        most = max(NUM_ALONE + 1, int(TOLERANCE[dtype] / torch.finfo(dtype).eps / 4))
        size = min(host.batch_size, most)
        batch, spares = records[:size], records[size:]
        if len(batch) < 2 or not spares:
            return
        before, seconds = self._gradient(snapshot, batch, draws)
        own, seconds_alone = self._gradient(snapshot, batch[:1], draws)
        for spare in chosen_records.most_different(batch[0], spares):
            after, again = self._gradient(snapshot, [spare, *batch[1:]], draws)
            new, again_alone = self._gradient(snapshot, [spare], draws)
            seconds, seconds_alone = min(seconds, again), min(seconds_alone, again_alone)
            _check_sum([own, exchange.minus({}, new)], exchange.minus(before, after), dtype)
        self._cost = size * seconds_alone / seconds

    def _gradient(self, snapshot: Snapshot, records: list[Any], draws: Draws) -> tuple[dict[str, Tensor], float]:
        """Return what the records add up to, by plain autograd, and the seconds that it took."""
        runs, copies = self._runs, self._runs.host.copies
        runs.host.copies = self._copies
        began = time.perf_counter()
        try:
            found = runs.again(snapshot, records, draws).private
        finally:
            runs.host.copies = copies
        scale = runs.scale(len(records))
        return {name: gradient * scale for name, gradient in found.items()}, time.perf_counter() - began


def _check_sum(parts: list[dict[str, Tensor]], whole: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """Check that gradients add up to a whole; return whether any of them is not zero."""
    found = exchange.add_up(parts, whole, TOLERANCE[dtype])
    if found is False:
        raise ComparisonError(_COUPLED)
    return found is not None


def _public(reason: PrivacyError) -> str:
    """Return an error message with ``#`` for every number, which may be the size of a record; digits in names stay."""
    return re.sub(r"(?<![\w.'])\d+(\.\d+)?(e[+-]?\d+)?(?![\w'])(?!\.\w)", "#", str(reason))
