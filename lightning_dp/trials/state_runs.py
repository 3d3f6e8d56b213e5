"""State runs: runs of the user's step whose states are compared, see ``state_check``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lightning_dp.per_sample.frozen_randomness import UnfrozenDrawError
from lightning_dp.sandbox.saved_state import changes_in, saved_state
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.trials import state_check
from lightning_dp.trials.given_records import Reread
from lightning_dp.trials.runs import TrialRuns
from lightning_dp.trials.state_check import LATER


def check_state(
    runs: TrialRuns,
    snapshot: Snapshot,
    records: list[Any],
    real: Any = (),
    anywhere: Any = None,
    later: int = LATER,
    ends: Sequence[bool] = (False, True),
) -> None:
    """Check that the state after a step, and later, does not depend on the records, nor on real ones.

    Args:
        runs: run the user's step.
        snapshot: of the state before the runs.
        records: of the training set.
        real: records of batches that have written something in a step.
        anywhere: tells whether a flag is set on any of the processes that run this check together.
        later: number of steps that follow.
        ends: whether an epoch ends after the first step, in each comparison.

    Raises:
        PrivacyError: the state depends on the records.
    """
    check = partial(_check, runs, snapshot, records, real, anywhere or runs.step.reduction.any, later, ends)
    try:
        check(freezes=runs.must_freeze)
    except UnfrozenDrawError:  # user code draws, which it did not do before
        check(freezes=True)


def _check(
    runs: TrialRuns,
    snapshot: Snapshot,
    records: list[Any],
    real: Any,
    anywhere: Any,
    later: int,
    ends_in_turn: Sequence[bool],
    *,
    freezes: bool,
) -> None:
    host, step = runs.host, runs.step
    together, is_noted = not step.runs_samples_alone, False

    def run(batches: list[list[Any]], *, ends: bool) -> list[state_check.After]:
        nonlocal is_noted
        found: list[state_check.After] = []
        trained = [p for accumulator in step.accumulators.values() for p in accumulator.parameters.values()]
        values = [parameter.detach().clone() for parameter in trained]
        before = changes_in(step.module, host.others())
        try:
            for number, batch in enumerate(batches):
                look = None if is_noted else runs.look()
                probe = runs.rehearse(batch, is_later=number > 0, freezes=freezes)
                if look is not None:  # what is written here is compared below
                    runs.loss_form.note_writes(look.writes_until(runs.look(), set()))
                is_noted = True
                if ends and number == 0:
                    host.end_epoch()
                state = saved_state(step.module, host.others(), before, whole=number == 0)
                state |= {f"the seed of {name}": seed for name, seed in probe.seeds.items()}
                state |= {"the answer of on_train_batch_start": host.skips, "trainer.should_stop": host.stops}
                state |= host.saved() if number < 2 else {}
                found.append((state, state_check.kept(probe.private, number)))
                with torch.no_grad():  # a rehearsed step may be so long that later gradients show nothing
                    for parameter, value in zip(trained, values, strict=True):
                        parameter.copy_(value)
                host.advance()
        except Exception:
            step.reduction.recover()
            raise
        finally:
            snapshot.put_back()
        return found

    most = step.settings.samples_at_once or 0 if together else 1  # the last microbatch alone has effect
    # others run where this rank has drawn nobody
    real = [_last(batch or records, most) for batch in real if anywhere(bool(batch))]
    shared: dict[str, Any] = {"together": together, "anywhere": anywhere, "real": real, "later": later}
    for ends in [each for each in ends_in_turn if not each or host.has_epoch_end]:
        state_check.check_state(partial(run, ends=ends), (records * 3)[:3], copies=host.copies, **shared)


def _last(batch: list[Any], most: int) -> list[Any]:
    """Return the last microbatch of at most so many records; 0 for all of them."""
    if not most:
        return batch
    return batch.last(most) if isinstance(batch, Reread) else batch[-most:]
