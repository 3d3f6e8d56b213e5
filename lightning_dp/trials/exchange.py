"""Exchange test: one sample of a batch is exchanged, and the gradients of all others must stay the same.

The arithmetic of the other rows is the same in both batches, so the tolerance is as small as rounding. The test finds
couplings that are too small for a comparison with single runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dp.errors import ComparisonError, PrivacyError
from lightning_dp.step.reduction import Reduction
from lightning_dp.trials.chosen_records import shape_of

#: Allowed relative difference of the others' gradients, by type: where shapes stay equal, and where they change.
TOLERANCE = {torch.float64: (1e-11, 1e-5), torch.float32: (2e-6, 1e-4), torch.bfloat16: (1e-3, 5e-2)}

#: Repetitions of a batch if a difference is so small that it may be rounding.
NUM_REPEATS = 3
#: Difference that one value may make which rounding pushes over a kink, such as that of ReLU.
AT_A_KINK = 0.05


@dataclass
class Fingerprint:
    """The gradients of the samples of a batch, in a few numbers.

    Args:
        norms: (parameters, B) norms of the gradients of each sample's own loss. Private.
        sums: parameter -> weighted sum over the samples that stay, scaled to equal length. Private.
        shapes: of all samples, the exchanged one included.
        stepped: optimizers that stepped, in order.
        drawn: states of the global generators after the forward.
        seeds: of the global generators after the forward, which user code may have set.
        again: runs the same batch once more, with the given draws.
    """

    norms: Tensor
    sums: dict[str, Tensor]
    shapes: Any
    stepped: tuple[int, ...]
    drawn: Any = None
    again: Callable[[Any], Fingerprint] | None = None
    seeds: dict[str, Any] = field(default_factory=dict)


def random_weights(size: int, leaves: int, order: Tensor | None = None) -> Tensor:
    """Return fixed weights of shape (size,), a third of them negative, and 0 for the exchanged sample.

    Args:
        size: number of samples.
        leaves: position of the exchanged sample.
        order: row of each sample in the batch, if that is another one than its position.
    """
    weights = torch.from_numpy(np.random.default_rng(7).uniform(0.5, 1.5, max(size, leaves + 1)))
    weights *= torch.where(torch.arange(len(weights)) % 3 == 0, -1.0, 1.0)
    weights[leaves] = 0.0
    return weights[:size] if order is None else torch.zeros_like(weights[:size]).index_copy(0, order, weights[:size])


def _least(dtype: torch.dtype) -> float:
    """Return the length from which a gradient has a direction; zero may be the floor of a norm's rounding instead."""
    return float(torch.finfo(dtype).tiny ** 0.5)


def fingerprint(
    reduction: Reduction, engine: Any, weights: Tensor, parameters: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return gradient norms per parameter and sample, and a weighted sum of the gradients scaled to equal length.

    Args:
        reduction: computes norms, and this process's part of a sum.
        engine: the engine that recorded the batch.
        weights: (B,); 0 leaves a sample out.
        parameters: private parameters of one optimizer by name.
    """
    norms = reduction.squared_norms(engine, [[name] for name in parameters]).sqrt()
    total = norms.nan_to_num(nan=0.0, posinf=0.0).square().sum(0).sqrt()
    usable = (total > _least(norms.dtype)) & norms.isfinite().all(0)
    factors = torch.where(usable, weights.to(norms) / total.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    return norms, reduction.weighted_sum(engine, factors, parameters)


def join(
    found: list[tuple[Tensor, dict[str, Tensor]]],
    records: list[Any],
    scale: float,
    stepped: tuple[int, ...],
    order: Tensor | None = None,
) -> Fingerprint:
    """Join the fingerprints of several optimizers into one.

    Args:
        found: result of :func:`fingerprint` per optimizer.
        records: all samples.
        scale: factor from gradients of the batch's loss to gradients of each sample's own loss.
        stepped: optimizers that stepped, in order.
        order: row of each sample in the batch, if that is another one than its position.
    """
    norms = torch.cat([norms for norms, _ in found]) * scale if found else torch.zeros(0, len(records))
    norms = norms if order is None else norms[:, order.to(norms.device)]
    sums = {name: total for _, part in found for name, total in part.items()}
    return Fingerprint(norms, sums, [shape_of(record) for record in records], stepped)


def compare(
    first: Fingerprint,
    second: Fingerprint,
    stays: Tensor,
    *,
    tolerance: float,
    what: str,
    total: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> None:
    """Check that samples which are in two batches have the same gradients in both.

    Args:
        first: fingerprint of one batch.
        second: fingerprint of the other; its norms have one column per sample of the first batch, or per sample that
            stays, in the same order.
        stays: (B,) marks the samples of the first batch that the second one holds too.
        tolerance: allowed difference, relative to a sample's own gradient.
        what: change of the exchanged sample.
        total: adds figures by parameter over the processes, where each holds a part of the sums.

    Raises:
        ComparisonError: a sample's gradient depends on another one.
    """
    if first.stepped != second.stepped:
        raise ComparisonError(_message(what, "which optimizers step changes with it"))
    kept = second.norms[:, stays] if second.norms.shape[1] == len(stays) else second.norms
    norms, others = first.norms[:, stays].double(), kept.double()
    if norms.shape != others.shape:
        raise ComparisonError(_message(what, "there is no loss any more, or there is one now"))
    if norms.numel() == 0:
        return
    lengths = norms.nan_to_num().square().sum(0).sqrt()
    # a gradient of zero may have the norm of a floor of rounding, which is scaled by the size of the batch
    differs = (norms - others).abs() > tolerance * lengths + _least(first.norms.dtype)
    differs |= norms.isfinite() != others.isfinite()
    if bool(differs.any()):
        worst = ((norms - others).abs() / lengths.clamp_min(1e-300)).nan_to_num(nan=float("inf")).max()
        number = f"{int(differs.any(0).sum())} of {norms.shape[1]}"
        most = f"up to {float(worst):.2g} of" if worst < 1e6 else "more than a million times"
        error = ComparisonError(_message(what, f"the gradients of {number} others differ by {most} their length"))
        error.difference = float(worst)
        raise error
    squares = {name: (first.sums[name].double() - second.sums[name].double()).square().sum() for name in first.sums}
    distance = sum(float(square) for square in total(squares).values()) ** 0.5
    if not distance <= 4 * tolerance * norms.shape[1]:
        error = ComparisonError(_message(what, f"the others' gradients point elsewhere (difference {distance:.2g})"))
        error.difference = distance
        raise error


def check_seeds(first: Fingerprint, second: Fingerprint, draws: Any, what: str) -> None:
    """Check that user code seeds no generator from records: the draws of all others would change with one of them.

    Args:
        first: fingerprint of one batch.
        second: fingerprint of the other.
        draws: of both.
        what: change of the exchanged sample.

    Raises:
        ComparisonError: the seed changes with a record, and not from run to run.
    """
    moved = [name for name, seed in first.seeds.items() if second.seeds.get(name, seed) != seed]
    if moved and first.again is not None and first.again(draws).seeds[moved[0]] == first.seeds[moved[0]]:
        raise ComparisonError(_message(what, f"the seed that user code gives {moved[0]} changes with it"))


def is_rounding(
    first: Fingerprint, second: Fingerprint, draws: Any, check: Callable[..., None], largest: float
) -> bool:
    """Tell whether repetitions of two batches agree, so that their difference is rounding that changes between runs.

    Threads share out their work in another way from time to time, and a library may choose another kernel. A coupling
    of samples shows in every pair of runs.

    Args:
        first: fingerprint of one batch.
        second: fingerprint of the other.
        draws: of both.
        check: raises ComparisonError if two fingerprints differ, by more than a tolerance if it is given one.
        largest: relative difference beyond which it is no rounding.
    """
    if first.again is None or second.again is None or not agrees(lambda: check(first, second, largest)):
        return False
    ones, others = [first], [second]
    for _ in range(NUM_REPEATS):
        ones.append(first.again(draws))
        others.append(second.again(draws))
        newest = [*((ones[-1], other) for other in others), *((one, others[-1]) for one in ones[:-1])]
        if any(agrees(partial(check, one, other)) for one, other in newest):
            return True
    return False


def agrees(check: Callable[[], None]) -> bool:
    """Tell whether a check raises no ComparisonError."""
    try:
        check()
    except ComparisonError:
        return False
    return True


def repeat_if_small(check: Callable[[int], None], *, repeats: bool) -> None:
    """Run a check that is given the number of a small change of all parameters.

    A difference that one value at a kink could make, pushed over it by another rounding, must also show where
    parameters are moved a little; a coupling does.
    """
    for moved in range(1 + NUM_REPEATS if repeats else 1):
        try:
            check(moved)
            return
        except PrivacyError as error:
            if not repeats or error.difference > AT_A_KINK or moved == NUM_REPEATS:
                raise


def only_by_draws(what: str) -> ComparisonError:
    """Return the error for a difference that is not there if all rows get equal random draws."""
    return ComparisonError(
        f"One sample of a batch was {what}, and the gradients of others differ, but only where random draws differ "
        "from row to row. Likely causes: a mean over entries that draws choose, as of masked words, whose denominator "
        "samples share (per_sample_loss=True counts each record's own loss); partners that are drawn at random, as in "
        "mixup; draws for rows in an order that depends on the records, as by their lengths (draw before the rows are "
        "sorted, or pass grad_sample='single')."
    )


def _message(what: str, found: str) -> str:
    if what.startswith("made"):  # exchanging it for an ordinary record changed nothing
        causes = (
            "Likely causes: a guard that skips, resets or clamps the loss of the whole batch where one sample is not "
            "finite or is large; steps of a solver, or a scale, that follow the largest sample; a product with zero "
            "that lets NaN pass. Let each sample have its own, or pass per_sample_loss=True, by which each record's "
            "own loss counts."
        )
    else:
        sizes = "a step that skips small batches, or takes another branch for them; " if what == "left out" else ""
        causes = (
            f"Likely causes: {sizes}BatchNorm or other statistics over the batch; a contrastive loss, mixing or hard "
            "examples; a mean over all tokens of the batch, or another denominator that samples share. Change the "
            "layer or the loss so that each sample has its own; where samples share no more than a denominator, "
            "per_sample_loss=True counts each record's own loss."
        )
    return (
        f"One sample of a batch was {what}, and {found}. Samples influence each other, so one record could move the "
        f"sum by more than the clipping norm. {causes}"
    )


def minus(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the difference of gradients by parameter; a missing one is zero."""
    return {**one, **{name: one.get(name, 0.0) - gradient for name, gradient in other.items()}}


def add_up(
    parts: Sequence[Mapping[str, Tensor]],
    whole: Mapping[str, Tensor],
    tolerance: float,
    total: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> bool | None:
    """Tell whether gradients add up to a whole, within a tolerance relative to the longest; None if all are zero.

    Args:
        parts: gradients by parameter; a missing one is zero.
        whole: their sum.
        tolerance: relative.
        total: adds figures by parameter over the processes, where each holds a part of the gradients.
    """

    def length(gradients: Mapping[str, Tensor]) -> float:
        squares = {name: gradient.double().square().sum() for name, gradient in gradients.items()}
        return float(sum(float(square) for square in total(squares).values()) ** 0.5)

    rest = whole
    for part in parts:
        rest = minus(rest, part)
    longest, left = max(map(length, parts)), length(rest)
    if longest == left == 0:
        return None
    return longest > 0 and left <= tolerance * longest  # not where a gradient is NaN
