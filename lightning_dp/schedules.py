"""Schedules of the noise multiplier: pure functions from the logical step to a factor on sigma.

    sigma_t = sigma_0 * schedule(t),   t = 0, 1, ... the logical step of the whole run

A schedule is any ``Callable[[int], float]`` with finite values > 0; "no schedule" is ``constant()``. The schedules made
here are frozen, and picklable unless made from a function that is not. They change at intervals: the value depends only
on ``e = t // every``, so that a ledger stays short. ``every`` is a number of steps (``steps_per_epoch`` for one epoch).

**Guarantee**: a factor depends on the step and on public numbers only, never on data, so sigma_t is public. Accounting
must add up the noise of every step: never report the epsilon of an "equivalent constant sigma", which is too small.

Two conventions, never mixed: ``factor`` and ``final`` act on SIGMA, ``rate`` acts on the VARIANCE sigma^2 as in the
paper, e.g. ``rate=0.81`` is ``factor=0.9``.

References:
    Chilukoti et al. 2023, Auto DP-SGD, arXiv 2312.02400v1 (the forms with ``rate``; its "linear" decay is geometric).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_dp import _schedule_forms as forms
from lightning_dp import _validate as check

Schedule = Callable[[int], float]


def constant(value: float = 1.0) -> Schedule:
    """Return a schedule with the same ``value`` at every step; the default leaves sigma unchanged.

    Args:
        value: factor on sigma, finite and > 0.

    Returns:
        The schedule.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> constant()(1000)
        1.0
    """
    return forms.Constant(check.check_positive("value", value))


def step(factor: float | None = None, every: int = 1, *, rate: float | None = None) -> Schedule:
    """Return a schedule that multiplies sigma by ``factor``, or its variance by ``rate``, after every ``every`` steps.

        factor^e,   or   rate^(e/2)

    Four plateaus with a factor of 0.8 to 0.9 are a mild schedule.

    Args:
        factor: factor on sigma, finite and > 0; below 1 the noise decreases.
        every: steps between changes, >= 1.
        rate: factor on the variance, finite and > 0. Exactly one of ``factor`` and ``rate``.

    Returns:
        The schedule.

    Raises:
        ValueError: numbers out of range, or not exactly one of the two.

    Example:
        >>> [step(0.5, every=2)(t) for t in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    forms.exactly_one(factor=factor, rate=rate)
    on_sigma = (
        check.check_positive("factor", factor) if factor is not None else math.sqrt(check.check_positive("rate", rate))
    )
    return forms.Geometric(on_sigma, forms.interval("every", every))


def exponential(factor: float | None = None, every: int = 1, *, rate: float | None = None) -> Schedule:
    """Return a schedule in which sigma decays exponentially.

        factor^e,   or   exp(-rate e / 2)

    Args:
        factor: factor on sigma, finite and > 0.
        every: steps between changes, >= 1.
        rate: decay rate of the variance, finite and >= 0. Exactly one of ``factor`` and ``rate``.

    Returns:
        The schedule.

    Raises:
        ValueError: numbers out of range, or not exactly one of the two.

    Example:
        >>> round(exponential(rate=0.02)(100) ** 2, 6)  # exp(-2)
        0.135335
    """
    forms.exactly_one(factor=factor, rate=rate)
    if factor is not None:
        return forms.Geometric(check.check_positive("factor", factor), forms.interval("every", every))
    return forms.Exponential(check.check_nonnegative("rate", rate), forms.interval("every", every))


def linear(
    final: float | None = None, over: int | None = None, every: int = 1, *, rate: float | None = None
) -> Schedule:
    """Return a schedule that moves sigma linearly to ``final``, or decays it by the paper's "linear" form.

        1 + (final - 1) min(e every / over, 1),   or   rate^(e/2) (geometric, as published)

    Args:
        final: factor on sigma from step ``over`` on, finite and > 0.
        over: steps until ``final`` is reached, >= 1; required with ``final``, else None.
        every: steps between changes, >= 1.
        rate: factor on the variance, finite and > 0. Exactly one of ``final`` and ``rate``.

    Returns:
        The schedule.

    Raises:
        ValueError: numbers out of range, or arguments that exclude each other.

    Example:
        >>> [linear(final=0.5, over=4)(t) for t in (0, 2, 4, 9)]
        [1.0, 0.75, 0.5, 0.5]
    """
    forms.exactly_one(final=final, rate=rate)
    if rate is not None:
        if over is not None:
            raise ValueError(f"Expected over=None with rate, got over={over}. `over` belongs to `final`.")
        return forms.Geometric(math.sqrt(check.check_positive("rate", rate)), forms.interval("every", every))
    return forms.Ramp(
        check.check_positive("final", final), forms.interval("over", over), forms.interval("every", every), cosine=False
    )


def time(rate: float, every: int = 1) -> Schedule:
    """Return a schedule in which sigma decays with the inverse root of time.

        (1 + rate e)^(-1/2)

    Args:
        rate: decay rate of the variance, finite and >= 0.
        every: steps between changes, >= 1.

    Returns:
        The schedule.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> time(rate=3.0)(1)
        0.5
    """
    return forms.InverseTime(check.check_nonnegative("rate", rate), forms.interval("every", every))


def cosine(final: float, over: int, every: int = 1) -> Schedule:
    """Return a schedule that moves sigma to ``final`` along half a cosine, and keeps it there.

        1 + (final - 1) (1 - cos(pi p)) / 2,   p = min(e every / over, 1)

    Args:
        final: factor on sigma from step ``over`` on, finite and > 0.
        over: steps until ``final`` is reached, >= 1.
        every: steps between changes, >= 1.

    Returns:
        The schedule.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> [round(cosine(final=0.5, over=4)(t), 6) for t in (0, 2, 4, 9)]
        [1.0, 0.75, 0.5, 0.5]
    """
    return forms.Ramp(
        check.check_positive("final", final), forms.interval("over", over), forms.interval("every", every), cosine=True
    )


def make_schedule(
    kind: str | Callable[[int], float], *, factor: float | None, rate: float | None, every: int, over: int
) -> Schedule:
    """Return the schedule of a named kind, or of a function.

    Args:
        kind: "constant", "linear", "time", "step", "exponential", "cosine", or a function from the number of the
            interval ``e = t // every`` to a factor on sigma.
        factor: factor on sigma: per interval ("step", "exponential"), or at step ``over`` ("linear", "cosine").
        rate: rate of the variance, as in the paper ("linear", "time", "step", "exponential").
        every: steps of one interval, >= 1.
        over: step at which "linear" and "cosine" reach their factor, >= 1: the last step of the run.

    Returns:
        The schedule.

    Raises:
        ValueError: an unknown kind, numbers out of range, or numbers that do not belong to the kind.

    Example:
        >>> [make_schedule("step", factor=0.5, rate=None, every=2, over=4)(t) for t in range(4)]
        [1.0, 1.0, 0.5, 0.5]
    """
    if callable(kind) or kind == "constant":
        if factor is not None or rate is not None:
            raise ValueError(
                f"Expected neither factor nor rate with kind={kind!r}, got factor={factor}, rate={rate}. "
                "Leave them out."
            )
        return forms.Intervals(kind, forms.interval("every", every)) if callable(kind) else constant()
    if kind == "time":
        if rate is None or factor is not None:
            raise ValueError(f"Expected rate alone with kind='time', got factor={factor}, rate={rate}. Pass only rate.")
        return time(rate, every)
    forms.exactly_one(factor=factor, rate=rate)
    if kind == "step":
        return step(factor, every, rate=rate)
    if kind == "exponential":
        return exponential(factor, every, rate=rate)
    if kind == "linear":
        return linear(rate=rate, every=every) if factor is None else linear(factor, over, every)
    if kind == "cosine":
        if factor is None:
            raise ValueError(f"Expected factor alone with kind='cosine', got factor=None, rate={rate}. Pass factor.")
        return cosine(factor, over, every)
    raise ValueError(
        "Expected kind to be 'constant', 'linear', 'time', 'step', 'exponential', 'cosine' or a function, got "
        f"kind={kind!r}."
    )


def runs(schedule: Schedule, start: int, stop: int) -> list[tuple[float, int]]:
    """Return the values of a schedule at steps start, ..., stop - 1, as runs of equal values.

    Args:
        schedule: any function from a step to a factor.
        start: first step, >= 0.
        stop: step after the last, >= start.

    Returns:
        Pairs (value, number of consecutive steps with exactly this value); the numbers add up to stop - start.

    Raises:
        ValueError: a value that is not finite and > 0, or not 0 <= start <= stop.

    Example:
        >>> runs(step(0.5, every=3), 1, 7)
        [(1.0, 2), (0.5, 3), (0.25, 1)]
    """
    if not 0 <= start <= stop:
        raise ValueError(f"Expected 0 <= start <= stop, got start={start}, stop={stop}. Steps count from 0.")
    groups: list[tuple[float, int]] = []
    current, count = math.nan, 0
    for number in range(start, stop):
        try:
            value = float(schedule(number))
        except OverflowError:
            value = math.inf
        if value == current:
            count += 1
            continue
        if not 0 < value < math.inf:
            raise ValueError(
                f"Expected a schedule with finite values > 0, got value={value} at step={number}. Noise that vanishes "
                "or overflows has no epsilon: let the schedule change more slowly."
            )
        if count:
            groups.append((current, count))
        current, count = value, 1
    if count:
        groups.append((current, count))
    return groups
