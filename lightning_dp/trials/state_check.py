"""State check: the state after a step must not depend on the records that the step saw (guarantee I2).

State that a checkpoint holds is compared directly. Other state (lists, running means, objects of the user's) is judged
by its effect on the gradient of a third record, in a step after each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.frozen_randomness import UnfrozenDrawError
from lightning_dp.sandbox.saved_state import ROUNDING, changed, few_of
from lightning_dp.trials import made_records

#: Values of a record that is unlike all others: the means of a few ordinary ones may be on one side of a threshold.
_EXTREMES = (1e6, 0.0, -1e6)

LATER = 4
"""Steps that follow a batch in a check: what the batch has left may show its effect in one of them."""

Gradients = dict[str, Tensor]
After = tuple[dict[str, Any], Gradients]
"""The state after a run, and the gradients of the run."""


def kept(gradients: Gradients, number: int) -> Gradients:
    """Return the gradients of a run, by its number, that are compared: none of the first, a few values of late ones."""
    return {name: few_of(each) if number > 1 else each for name, each in gradients.items()} if number else {}


def check_state(
    run: Callable[[list[list[Any]]], list[After]],
    records: list[Any],
    *,
    together: bool,
    copies: int = 1,
    anywhere: Callable[[bool], bool] = bool,
    real: Sequence[list[Any]] = (),
    later: int = LATER,
) -> None:
    """Check that the state after a step depends neither on the records of the step nor on their number.

    Args:
        run: runs the step on one list of records after the other, under the same randomness and without lasting
            effect; returns the state after each list, and the gradients of each but the first.
        records: three records of the training set.
        together: whether a step may see several records at once.
        copies: number of copies that ``run`` makes of a single record; the test of another number uses more records.
        anywhere: tells whether a flag is set on any of the processes that run this check together.
        real: records of batches that have written something in a step; few other records may do so.
        later: runs of the third record that follow on a run of the second one. If they are fewer than ``LATER``, in a
            repeated check, there is one record of extreme values in place of three.

    Raises:
        PrivacyError: the state depends on them; the message names the state, or says that a later gradient changes.
    """
    first, second, third = records
    reference = run([[first], *[[third]] * later])
    more = [first] * copies + [second]
    others = [([second], "another record")]
    if together:
        others.append((more, f"{len(more)} records instead of {copies}"))
    others += [(batch, "the records of a batch") for batch in real]
    num_real = len(others)
    extremes = made_records.extremes(first, _EXTREMES[: None if later == LATER else 1])
    others += [([made], "a record of extreme values") for made in extremes]
    for number, (other, what) in enumerate(others):
        try:
            found = run([other, *[[third]] * (1 if number else later)])
        except (PrivacyError, UnfrozenDrawError):
            raise
        except Exception:
            if number < num_real:
                raise
            continue  # the user's code refuses such a record
        for place, (state, _) in enumerate(found):
            names = list(changed(reference[place][0], state))
            if anywhere(any(not isinstance(state.get(name), Tensor) for name in names)):
                again = run([[first], *[[third]] * place])  # shows the clock, say, and counts that go on
                moving = set(changed(reference[place][0], again[place][0]))
                names = [name for name in names if name not in moving or isinstance(state.get(name), Tensor)]
            if not anywhere(bool(names)):
                continue
            raise PrivacyError(
                f"training_step leaves {_listed(names)} with another value after {what}. Such state is saved, or "
                "read by other samples and later steps, without noise. Compute it on public data before fit, make it "
                "follow the weights alone, or leave it out (check_per_sample=False accepts it, outside the guarantee)."
            )
        if anywhere(not all(_same_gradients(one, two) for (_, one), (_, two) in zip(reference, found, strict=False))):
            raise PrivacyError(
                f"The gradient of a record changes with what training_step saw before: it differs after {what}. Some "
                "object keeps values of earlier records (a queue, a running mean, a cache) and a later loss reads "
                "them without noise, or a random generator of the module goes on by the number of records. Leave it "
                "out, compute it on public data before fit, or draw from the global generators."
            )


def _same_gradients(left: Gradients, right: Gradients) -> bool:
    if left.keys() != right.keys():
        return False
    pairs = [(left[name].double(), right[name].double()) for name in left]
    size = sum(float(one.nan_to_num().square().sum()) for one, _ in pairs) ** 0.5
    for one, other in pairs:
        if not torch.equal(one.isfinite(), other.isfinite()):
            return False
        distance = float((one - other).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).norm())
        if not distance <= 10 * ROUNDING * size:
            return False
    return True


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3]) or "state of another rank"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
