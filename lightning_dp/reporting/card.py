"""The privacy card of a run, as plain values: all that a reader needs to judge its guarantee."""

from __future__ import annotations

import itertools
import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning_dp.accounting import Accountant, Ledger, PLDAccountant, attack_bounds, first_steps
from lightning_dp.accounting.attacks import FALSE_POSITIVE_RATES
from lightning_dp.reporting import statement
from lightning_dp.reporting.notes import RunNotes
from lightning_dp.step.plan import DPPlan

FORMAT = 1
#: Steps at which the card states epsilon, at most.
NUM_POINTS = 25
#: Points per power of ten of the false positive rate, and the powers that the curve covers.
_CURVE_POINTS, _CURVE_DECADES = 12, 5

TYPES = {
    "pld": "privacy loss distributions",
    "rdp": "Rényi differential privacy",
    "prv": "privacy random variables",
    "gdp": "Gaussian differential privacy, exact",
    "tcdp": "truncated concentrated differential privacy",
}
#: Authors of the code that computes epsilon; for names not listed, this package.
COMPUTED_BY = {"rdp": "dp-accounting", "prv": "opacus"}


def epsilon_curve(ledger: Ledger, accountant: Accountant, delta: float) -> list[tuple[int, float]]:
    """Return epsilon after the first, the last and evenly spaced steps in between.

    Returns:
        Pairs (step, epsilon), at most ``NUM_POINTS``. Public.

    Example:
        >>> from lightning_dp.accounting import PrivacyEvent, make_accountant
        >>> ledger = Ledger()
        >>> ledger.record(PrivacyEvent.gaussian(noise_multiplier=2.0), count=4)
        >>> [(step, round(epsilon, 2)) for step, epsilon in epsilon_curve(ledger, make_accountant("gdp"), 1e-5)]
        [(1, 1.99), (2, 2.94), (3, 3.71), (4, 4.38)]
    """
    taken: list[Any] = [(run.event, run.num_steps, run.num_passes) for run in ledger.entries]
    total = ledger.num_steps
    places = NUM_POINTS - 1
    steps = sorted(
        ({1} if total else set()) | {math.ceil(total * place / places) for place in range(1, places + 1)} - {0}
    )
    prefixes = (
        (step, Ledger(ledger.neighboring_relation, ledger.unit).extended(first_steps(taken, step))) for step in steps
    )
    return [(step, accountant.epsilon(prefix, delta)) for step, prefix in prefixes]


def privacy_card(
    plan: DPPlan, ledger: Ledger, accountant: Accountant, *, notes: RunNotes | None = None
) -> dict[str, Any]:
    """Return the privacy card of a run, as plain values for JSON.

    **Guarantee**: the card holds public values only; nothing in it is computed from the data without noise.

    Args:
        plan: the public settings of the run.
        ledger: all releases of the run, at least one step.
        accountant: computes epsilon from it.
        notes: further facts to state.

    Returns:
        Nested dictionaries. An infinite epsilon is the string "inf", because JSON has no such number.

    Raises:
        ValueError: no steps recorded.

    References:
        Ponomareva et al. 2023, How to DP-fy ML, section 5.3: the items to report and their order.
    """
    if ledger.num_steps == 0:
        raise ValueError(
            "Expected at least one private step, got no steps recorded. Write the card once training has begun."
        )
    notes = notes or RunNotes()
    epsilon = accountant.epsilon(ledger, plan.delta)
    return {
        "format": FORMAT,
        "setting": "central",
        "statement": _statement(plan, ledger, epsilon, notes),
        "epsilon": _plain(epsilon),
        "delta": plan.delta,
        "definition": {
            "data_accesses": (
                "one training run, all its steps, those of resumed runs and searches in the ledger included"
            ),
            "mechanism_output": "the trained parameters after every step",
            "unit": statement.describe_unit(plan),
            "counted_as": plan.unit,
            "neighboring_relation": plan.neighboring_relation,
            "neighboring_datasets": f"differ by {statement.describe_relation(plan.neighboring_relation, plan.unit)}",
            "dataset_size": plan.dataset_size,
        },
        "accounting": {
            "accountant": accountant.name,
            "type": TYPES.get(accountant.name, accountant.name),
            "computed_by": _computed_by(accountant.name),
            "assumptions": _assumptions(plan),
            "assumptions_hold": not notes.seeded,
            "steps": ledger.num_steps,
            "target_epsilon": plan.target_epsilon,
            "epsilon_over_steps": [
                [step, _plain(value)] for step, value in epsilon_curve(ledger, accountant, plan.delta)
            ],
        },
        "attacks": _attacks(ledger, accountant),
        "mechanism": {
            "sampling": statement.describe_sampling(plan),
            "sample_rate": plan.sample_rate,
            "batches_per_pass": plan.batches_per_pass,
            "expected_batch_size": plan.expected_batch_size,
            "clipping": repr(plan.clipping),
            "noise_multiplier": plan.noise_multiplier,
            "noise_over_steps": _noise_over_steps(ledger),
            "noise_generator": _generator(notes),
            "correlation": None if plan.correlation is None else plan.correlation.state_dict(),
            "callbacks": list(notes.mechanisms),
            "samples_kept_apart": list(notes.kept_apart),
        },
        "audits": list(notes.audits),
        "not_covered": [
            *(f"logged without noise: {name}" for name in sorted(notes.nonprivate_logs)),
            *(f"chosen by un-noised figures: {choice}" for choice in notes.choices),
            *statement.not_covered(plan),
        ],
        "software": {
            name: _version(name) for name in ("lightning-dp", "torch", "lightning", "opacus", "dp-accounting")
        },
    }


def _statement(plan: DPPlan, ledger: Ledger, epsilon: float, notes: RunNotes) -> str:
    if math.isinf(epsilon):
        return f"This run is NOT differentially private: {statement.why_infinite(ledger)}."
    caveat = " A seed was set: nothing here holds against someone who knows it." if notes.seeded else ""
    return (
        f"The parameters after {ledger.num_steps} steps, and whatever is computed from them without the training data, "
        f"are (epsilon, delta)-differentially private with epsilon = {statement.describe_epsilon(epsilon)} and delta = "
        f"{plan.delta:g}, for {statement.describe_relation(plan.neighboring_relation, plan.unit)}.{caveat}"
    )


def _noise_over_steps(ledger: Ledger) -> list[dict[str, Any]]:
    """Return the ledger's runs of equal events: number of steps, noise multiplier and note."""
    return [
        {"steps": sum(run.num_steps for run in runs), "noise_multiplier": event.noise_multiplier, "note": event.reason}
        for event, runs in itertools.groupby(ledger.entries, key=lambda run: run.event)
    ]


def _attacks(ledger: Ledger, accountant: Accountant) -> dict[str, Any]:
    """Return the largest true positive rates and the largest advantage of any attack."""
    curve = [10 ** (place / _CURVE_POINTS) for place in range(-_CURVE_DECADES * _CURVE_POINTS, 1)]
    pld = accountant if isinstance(accountant, PLDAccountant) else None
    bounds = attack_bounds(ledger, [*FALSE_POSITIVE_RATES, *curve], accountant=pld)
    rates = [list(pair) for pair in zip(bounds.false_positive_rates, bounds.true_positive_rates, strict=True)]
    stated = len(FALSE_POSITIVE_RATES)
    return {
        "largest_true_positive_rates": rates[:stated],
        "largest_advantage": bounds.advantage,
        "computed_from": TYPES["pld"],
        "curve": rates[stated:],
    }


def _assumptions(plan: DPPlan) -> str:
    if statement.amplifies_allocation(plan):
        return (
            f"each {plan.unit} joins exactly one of the {plan.batches_per_pass} batches of a pass, uniformly and "
            "independently, as the sampler draws them (random allocation); fresh Gaussian noise at every step"
        )
    if plan.correlation is not None:
        known = plan.correlation
        return (
            f"each {plan.unit} takes part at most {known.passes} times, at least {known.separation} steps apart; noise "
            f"{known.describe()}"
        )
    if plan.sampling != "poisson":
        return (
            f"each {plan.unit} is in one batch of a pass (no amplification is claimed); fresh Gaussian noise at every "
            "step"
        )
    return (
        f"each {plan.unit} joins each batch independently (Poisson), as the sampler draws them; fresh Gaussian noise "
        "at every step"
    )


def _generator(notes: RunNotes) -> str:
    if notes.seeded:
        return "Gaussian, from a known seed"
    return (
        "Gaussian, from a cryptographic generator" if notes.secure_rng else "Gaussian, seeded from the operating system"
    )


def _computed_by(accountant: str) -> str:
    package = COMPUTED_BY.get(accountant, "lightning-dp")
    return f"{package} {_version(package)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"
