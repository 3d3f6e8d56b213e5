"""Calibration: the noise that a budget needs, and the steps that it allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_dp.accounting.base import Accountant, check_delta
from lightning_dp.accounting.events import PlannedRun, parse_run
from lightning_dp.accounting.ledger import Ledger

_SMALLEST, _LARGEST = 1e-3, 1e7  # noise multipliers searched
_CLOSE = 0.995  # share of the target that is close enough
_AIM = 0.9985  # share of the target that is aimed at
_SAFE = 1 - 1e-6  # the root is moved to the safe side of rounding
_NARROW = 1e-7  # width of the bracket, in log sigma, at which the search ends in any case
_MAX_EVALUATIONS = 200
_MAX_REFINEMENTS = 4  # full evaluations at roots of the coarse accountant


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    accountant: Accountant,
    runs: Callable[[float], Sequence[PlannedRun]],
    history: Ledger,
) -> float:
    """Return nearly the smallest noise multiplier with which the planned steps fit a budget.

    min sigma_0 such that epsilon(history followed by runs(sigma_0)) <= target_epsilon

    **Guarantee**: the epsilon of the returned multiplier, by the same accountant, never exceeds the target. It is at
    least 99 % of the target if epsilon is continuous in sigma_0 there and exceeds the target at sigma_0 = 1e-3.

    Args:
        target_epsilon: Budget for history and plan together, in (0, inf).
        delta: In (0, 1).
        accountant: Accountant that computes epsilon. Its cache is used.
        runs: Function that returns the planned steps for a sigma_0, as items that `Ledger.extended` takes. Epsilon must
            not grow with sigma_0.
        history: The releases so far.

    Returns:
        sigma_0 in [1e-3, 1e7]. Public.

    Raises:
        ValueError: If the target is out of range, the history exceeds it, or no noise multiplier reaches it.

    Example:
        >>> from lightning_dp.accounting import PrivacyEvent, make_accountant
        >>> def runs(sigma):
        ...     return [(PrivacyEvent.poisson(noise_multiplier=sigma, sample_rate=0.01), 1000)]
        >>> sigma = calibrate_noise_multiplier(
        ...     target_epsilon=3.0, delta=1e-5, accountant=make_accountant("pld"), runs=runs, history=Ledger()
        ... )
        >>> round(sigma, 1)
        0.8
    """
    check_delta(delta)
    _check_budget("target_epsilon", target_epsilon)
    spent = accountant.epsilon(history, delta)
    if spent > target_epsilon:
        raise ValueError(
            f"Expected target_epsilon above what is already spent, got target_epsilon={target_epsilon} and "
            f"epsilon={spent:.6g} spent in {history.num_steps} steps. Raise the target or stop training."
        )

    def epsilon_of(sigma: float) -> float:
        return accountant.epsilon_or_inf(history.extended(runs(sigma)), delta)

    search = accountant.coarse()

    def coarse_of(sigma: float) -> float:
        return search.epsilon_or_inf(history.extended(runs(sigma)), delta)

    bracket = _Bracket()
    start, aim = 1.0, target_epsilon
    for _ in range(_MAX_REFINEMENTS if search is not accountant else 0):
        coarse = _solve(coarse_of, _bracket(coarse_of, _Bracket(), aim, start=start), aim)
        if coarse.enough is None:
            break
        start = coarse.enough
        bracket.add(start, epsilon := epsilon_of(start), target_epsilon)
        if bracket.is_close(target_epsilon) or not 0 < epsilon < math.inf:
            break
        aim *= _AIM * target_epsilon / epsilon
    bracket = _solve(epsilon_of, _bracket(epsilon_of, bracket, target_epsilon, start=start), target_epsilon)
    if bracket.enough is None:
        raise ValueError(
            f"Expected a reachable target, got target_epsilon={target_epsilon}: noise_multiplier={_LARGEST:g} still "
            f"gives epsilon={bracket.above:.6g}, of which {spent:.6g} is already spent. "
            "Raise the target or plan fewer steps."
        )
    return bracket.enough


def max_steps_within(
    *, epsilon: float, delta: float, accountant: Accountant, history: Ledger, runs: Sequence[PlannedRun]
) -> int:
    """Return the number of planned steps that fit a budget.

    max k such that epsilon(history followed by the first k steps) <= epsilon

    **Guarantee**: the epsilon after these steps, by the same accountant, is within the budget if the history is.

    Args:
        epsilon: Budget for history and plan together, in (0, inf).
        delta: In (0, 1).
        accountant: Accountant that computes epsilon.
        history: The releases so far.
        runs: The plan, as items that `Ledger.extended` takes.

    Returns:
        Number of steps, from 0 (also if the history exceeds the budget) to the length of the plan. Public.

    Raises:
        ValueError: If the budget or delta is out of range.

    Example:
        >>> from lightning_dp.accounting import PrivacyEvent, make_accountant
        >>> plan = [(PrivacyEvent.gaussian(noise_multiplier=2.0), 100)]
        >>> max_steps_within(epsilon=4.4, delta=1e-5, accountant=make_accountant("gdp"), history=Ledger(), runs=plan)
        4
    """
    check_delta(delta)
    _check_budget("epsilon", epsilon)

    def fits(num_steps: int) -> bool:
        return accountant.epsilon(history.extended(first_steps(runs, num_steps)), delta) <= epsilon

    num_planned = sum(parse_run(run)[1] for run in runs)
    if fits(num_planned):
        return num_planned
    fitting, exceeding = 0, num_planned
    while exceeding - fitting > 1:
        middle = (fitting + exceeding) // 2
        if fits(middle):
            fitting = middle
        else:
            exceeding = middle
    return fitting


@dataclass
class _Bracket:
    """Noise multipliers on both sides of the target with their epsilons; None if unknown."""

    too_small: float | None = None
    above: float = math.inf
    enough: float | None = None
    below: float = 0.0

    def add(self, sigma: float, epsilon: float, target: float) -> None:
        if epsilon > target * _SAFE:
            if self.too_small is None or sigma > self.too_small:
                self.too_small, self.above = sigma, epsilon
        elif self.enough is None or sigma < self.enough:
            self.enough, self.below = sigma, epsilon

    def is_close(self, target: float) -> bool:
        return self.below >= _CLOSE * target


def _bracket(epsilon_of: Callable[[float], float], bracket: _Bracket, target: float, *, start: float) -> _Bracket:
    """Extend the bracket until it has both sides of the target, a multiplier close to it, or an end of the range."""
    sigma, reach = start, 1.02  # widened with every step
    while not bracket.is_close(target) and (bracket.too_small is None or bracket.enough is None):
        if sigma not in (bracket.too_small, bracket.enough):
            bracket.add(sigma, epsilon_of(sigma), target)
            continue
        if sigma == (_SMALLEST if bracket.too_small is None else _LARGEST):
            break
        # epsilon falls about as 1 / sigma, or faster
        if bracket.too_small is None:
            factor = max(min(bracket.below / (_AIM * target), 1 / reach), 1 / 16)
        else:
            factor = min(max(bracket.above / (_AIM * target), reach), 16.0) if bracket.above < math.inf else reach
        sigma = min(max(sigma * factor, _SMALLEST), _LARGEST)
        reach = min(reach**2, 16.0)
    return bracket


def _solve(epsilon_of: Callable[[float], float], bracket: _Bracket, target: float) -> _Bracket:
    """Narrow the bracket until its safe end is close to the target."""
    for _ in range(_MAX_EVALUATIONS):
        if bracket.too_small is None or bracket.enough is None or bracket.is_close(target):
            break
        if math.log(bracket.enough / bracket.too_small) < _NARROW:
            break
        sigma = _next_guess(bracket.too_small, bracket.above, bracket.enough, bracket.below, _AIM * target)
        bracket.add(sigma, epsilon_of(sigma), target)
    return bracket


def _next_guess(too_small: float, above: float, enough: float, below: float, aim: float) -> float:
    """Return a multiplier inside the bracket, from a power law through its ends, else their geometric mean."""
    share = 0.5
    if 0 < below < aim < above < math.inf:
        share = min(max(math.log(above / aim) / math.log(above / below), 0.02), 0.98)
    return math.exp((1 - share) * math.log(too_small) + share * math.log(enough))


def first_steps(runs: Sequence[PlannedRun], num_steps: int) -> list[PlannedRun]:
    """Return the first steps of a plan; a shortened run keeps every pass that it has started.

    Args:
        runs: The plan, as items that `Ledger.extended` takes.
        num_steps: Number of steps to keep, at least 0.
    """
    first: list[PlannedRun] = []
    for run in runs:
        event, steps, passes = parse_run(run)
        taken = min(steps, num_steps)
        if taken:
            first.append((event, taken, -(-taken * passes // steps)))
        num_steps -= taken
    return first


def _check_budget(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"Expected 0 < {name} < inf, got {name}={value}. State a finite budget above 0.")
