"""``lightning-dp epsilon`` and ``lightning-dp calibrate``: each accountant's answer, or the reason why it has none."""

from __future__ import annotations

import argparse
import math
from typing import Any

from lightning_dp import _validate as check
from lightning_dp.accounting import (
    ACCOUNTANTS,
    Accountant,
    Ledger,
    calibrate_noise_multiplier,
    make_accountant,
    user_epsilon,
)
from lightning_dp.callbacks.noise_scheduler import PublicSchedule
from lightning_dp.cli import output
from lightning_dp.clipping import FlatClipping
from lightning_dp.noise.correlated import CorrelatedNoise
from lightning_dp.reporting.statement import describe_epsilon, describe_sampling
from lightning_dp.run_length import RunLength
from lightning_dp.schedules import Schedule, constant
from lightning_dp.step.correlation import Correlation
from lightning_dp.step.plan import DPPlan, default_delta

#: Notes for the reader on accountants that have an answer.
NOTES = {
    "pld": "tight; DPStrategy's default",
    "rdp": "looser, the classical one",
    "prv": "opacus' upper bound; includes an absolute 0.01",
    "gdp": "exact",
    "tcdp": "closed form, loose",
}
#: The same for passes under random allocation.
ALLOCATION_NOTES = {"pld": NOTES["pld"], "rdp": "valid but loose for random allocation"}


def epsilon(options: argparse.Namespace) -> int:
    """Print the epsilon of a planned run by every requested accountant; return 0."""
    plan = _plan(options, check.check_nonnegative("noise_multiplier", options.noise_multiplier))
    ledger = _spent(plan, plan.noise_multiplier)
    answers: list[dict[str, Any]] = []
    for name in options.accountant or ACCOUNTANTS:
        try:
            value, reason = make_accountant(name).epsilon(ledger, plan.delta), None
        except ValueError as error:
            value, reason = None, str(error)
        answers.append({"accountant": name, "epsilon": _plain(value), "reason": reason})
    user: dict[str, Any] = {}
    if options.records_per_user is not None:
        epsilon_of_user = user_epsilon(ledger, plan.delta, records_per_user=options.records_per_user)
        user = {"records_per_user": options.records_per_user, "user_epsilon": _plain(epsilon_of_user)}
    if options.json:
        reply = {**_described(plan), "noise_multiplier": plan.noise_multiplier, "answers": answers, **user}
        output.write_json(reply)
        return 0
    output.write(f"{_title(plan)}, noise multiplier {plan.noise_multiplier:g}{_schedule_note(options)}\n")
    rows = [(a["accountant"], _shown(a["epsilon"]), a["reason"] or _note(a["accountant"], plan)) for a in answers]
    output.write_table(("accountant", "epsilon", "note"), rows)
    if user:
        output.write(
            f"\nepsilon {_shown(user['user_epsilon'])} for a user with at most {user['records_per_user']} records "
            f"({_user_note(plan)}, dp-accounting)"
        )
    return 0


def calibrate(options: argparse.Namespace) -> int:
    """Print the noise multiplier that a target epsilon needs, by every requested accountant; return 0."""
    target = check.check_positive("target_epsilon", options.target_epsilon)
    plan = _plan(options, 1.0)
    answers: list[dict[str, Any]] = []
    for name in options.accountant or ACCOUNTANTS:
        accountant = make_accountant(name)
        answer: dict[str, Any] = {"accountant": name, "noise_multiplier": None, "epsilon": None, "reason": None}
        try:
            sigma = _calibrated(plan, target, accountant)
            answer |= {"noise_multiplier": sigma, "epsilon": accountant.epsilon(_spent(plan, sigma), plan.delta)}
        except ValueError as error:
            answer["reason"] = str(error)
        answers.append(answer)
    if options.json:
        output.write_json({**_described(plan), "target_epsilon": target, "answers": answers})
        return 0
    output.write(f"{_title(plan)}, epsilon <= {target:g}{_schedule_note(options)}\n")
    rows = [
        (
            answer["accountant"],
            "-" if answer["noise_multiplier"] is None else f"{_rounded_up(answer['noise_multiplier']):.5g}",
            _shown(answer["epsilon"]),
            answer["reason"] or _note(answer["accountant"], plan),
        )
        for answer in answers
    ]
    output.write_table(("accountant", "noise multiplier", "epsilon", "note"), rows)
    return 0


def parse_schedule(text: str, run: RunLength) -> Schedule:
    """Return the schedule that ``KIND[:FACTOR or rate=RATE[:EVERY_N_EPOCHS]]`` names.

    Args:
        text: the argument as typed.
        run: length of the run.

    Raises:
        ValueError: ``text`` does not have this form, or a number is out of range.

    Example:
        >>> parse_schedule("step:0.5:2", RunLength(steps=40, steps_per_epoch=10))(25)
        0.5
    """
    kind, *rest = text.split(":")
    numbers: dict[str, Any] = {"factor": None, "rate": None, "every_n_epochs": 1}
    try:
        if rest:
            name, _, number = rest[0].rpartition("=")
            if name not in ("", "factor", "rate") or len(rest) > 2:
                raise ValueError(text)
            numbers[name or "factor"] = float(number)
        if len(rest) == 2:
            numbers["every_n_epochs"] = int(rest[1])
    except ValueError:
        raise ValueError(
            f"Expected a schedule KIND[:FACTOR[:EVERY_N_EPOCHS]], got schedule={text!r}. Write step:0.9:15, or "
            "step:rate=0.81:15 for a rate on the variance."
        ) from None
    return PublicSchedule(kind, interval="epoch", **numbers)(run)


def parse_noise(text: str) -> CorrelatedNoise:
    """Return the correlated noise that ``auto``, a decay or ``bands=P`` describes.

    Args:
        text: the argument as typed.

    Raises:
        ValueError: ``text`` does not have this form, or the number is out of range.

    Example:
        >>> parse_noise("0.95"), parse_noise("bands=4").bands
        (CorrelatedNoise(decay=0.95, bands=None), 4)
    """
    if text == "auto":
        return CorrelatedNoise()
    name, _, number = text.rpartition("=")
    try:
        if name in ("", "decay", "bands"):
            return CorrelatedNoise(bands=int(number)) if name == "bands" else CorrelatedNoise(decay=float(number))
    except ValueError as error:
        if str(error).startswith("Expected"):
            raise
    raise ValueError(f"Expected auto, a decay or bands=P, got correlated={text!r}. Write auto, 0.95 or bands=4.")


def _plan(options: argparse.Namespace, noise_multiplier: float) -> DPPlan:
    size = check.check_count("dataset_size", options.dataset_size)
    batch = check.check_count("batch_size", options.batch_size)
    if batch > size:
        raise ValueError(
            f"Expected batch_size <= dataset_size, got batch_size={batch} and dataset_size={size}. A batch holds each "
            f"{options.unit} once."
        )
    steps_per_epoch = round(size / batch)  # as the strategy's loader
    if options.steps is None:
        steps = check.check_count("epochs", options.epochs) * steps_per_epoch
    else:
        steps = check.check_count("steps", options.steps)
    poisson, correlation = options.sampling == "poisson", None
    if options.correlated is not None:
        if options.sampling != "cyclic" or options.schedule:
            raise ValueError(
                f"Expected sampling=cyclic without a schedule for correlated noise, got sampling={options.sampling} "
                f"and schedule={options.schedule!r}. Its one privacy event needs a fixed order and the same noise in "
                "all steps."
            )
        passes = -(-steps // steps_per_epoch)
        noise = parse_noise(options.correlated).planned(steps, steps_per_epoch, passes)
        correlation = Correlation(noise, steps, steps_per_epoch, passes)
    return DPPlan(
        sampling=options.sampling,
        dataset_size=size,
        expected_batch_size=batch,
        sample_rate=batch / size if poisson else None,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        noise_multiplier=noise_multiplier,
        clipping=FlatClipping(),
        delta=default_delta(size) if options.delta is None else check.check_probability("delta", options.delta),
        schedule=parse_schedule(options.schedule, RunLength(steps, steps_per_epoch))
        if options.schedule
        else constant(),
        neighboring_relation=options.neighboring_relation,
        batches_per_pass=steps_per_epoch if options.sampling == "shuffle" else None,
        correlation=correlation,
        unit=options.unit,
    )


def _note(accountant: str, plan: DPPlan) -> str:
    """Return the note on an accountant's answer."""
    if plan.allocates:
        return ALLOCATION_NOTES.get(accountant, "upper bound: a pass counts as one Gaussian, without amplification")
    return NOTES[accountant]


def _user_note(plan: DPPlan) -> str:
    """Return a note on the computation of a user's epsilon."""
    if plan.sampling != "poisson":
        return "all of them in one batch of each pass, without amplification"
    return "mixture of Gaussians"


def _spent(plan: DPPlan, noise_multiplier: float) -> Ledger:
    assert plan.steps is not None
    return Ledger(plan.neighboring_relation, plan.unit).extended(plan.runs(0, plan.steps, noise_multiplier))


def _calibrated(plan: DPPlan, target: float, accountant: Accountant) -> float:
    stop = plan.steps
    assert stop is not None
    return calibrate_noise_multiplier(
        target_epsilon=target,
        delta=plan.delta,
        accountant=accountant,
        runs=lambda sigma: plan.runs(0, stop, sigma),
        history=Ledger(plan.neighboring_relation, plan.unit),
    )


def _described(plan: DPPlan) -> dict[str, Any]:
    names = (
        "dataset_size", "expected_batch_size", "sampling", "sample_rate", "batches_per_pass", "steps", "delta",
        "neighboring_relation", "unit",
    )  # fmt: skip
    correlation = None if plan.correlation is None else plan.correlation.state_dict()
    return {**{name: getattr(plan, name) for name in names}, "correlation": correlation}


def _title(plan: DPPlan) -> str:
    return (
        f"{plan.steps} steps on {plan.dataset_size} {plan.unit}s, expected batch size {plan.expected_batch_size}, "
        f"{describe_sampling(plan)}, {plan.neighboring_relation}, delta {plan.delta:g}"
        + (f", noise {plan.correlation.describe()}" if plan.correlation is not None else "")
    )


def _schedule_note(options: argparse.Namespace) -> str:
    return f" under the schedule {options.schedule}" if options.schedule else ""


def _rounded_up(noise_multiplier: float) -> float:
    """Return a noise multiplier rounded up to five digits, so that the target still holds."""
    digits = 4 - math.floor(math.log10(noise_multiplier))
    return float(math.ceil(noise_multiplier * 10**digits) / 10**digits)


def _plain(value: float | None) -> float | str | None:
    return "inf" if value == math.inf else value


def _shown(value: float | str | None) -> str:
    return "-" if value is None else describe_epsilon(float(value))
