"""The privacy statement of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from typing_extensions import override

from lightning_dp.accounting import ACCOUNTANTS, Accountant, Ledger
from lightning_dp.clipping import Clipping
from lightning_dp.reporting.notes import RunNotes
from lightning_dp.step.correlation import Correlation
from lightning_dp.step.plan import DPPlan

RELATIONS = {
    "add_or_remove_one": "adding or removing {one}",
    "replace_one": "replacing {one} by another",
    "zero_out": "replacing {one} by one that contributes nothing",
}
NOT_COVERED = (
    "what a training step logs or prints (losses and metrics on training data), and checkpoints or stops chosen by it",
    "validation and test data",
    "hyper-parameters chosen by training on this data: in other runs, or by lr_find or scale_batch_size",
    "module state other than trained parameters, if it carries training data",
    "the number of records, which counts as public, and exceptions that user code raises on some records",
    "preprocessing with statistics of the data, such as means, vocabularies or selected features",
)
_OTHER_RECORDS = "more than one record of a person or series: each is hidden on its own"


def not_covered(plan: DPPlan) -> list[str]:
    """Return the exclusions from the guarantee of a run with this plan, one entry each."""
    return [*NOT_COVERED, *([_OTHER_RECORDS] if plan.unit == "record" else [])]


def describe_relation(relation: str, unit: str = "record") -> str:
    """Return the difference between neighbouring datasets, in words.

    Example:
        >>> describe_relation("add_or_remove_one", "user")
        'adding or removing all records of one user'
    """
    return RELATIONS[relation].format(one="all records of one user" if unit == "user" else "one record")


def describe_unit(plan: DPPlan) -> str:
    """Return the protected unit, in words."""
    if plan.unit == "record":
        return "one record of the training set"
    most = plan.records_per_unit
    return f"one user with all its records, of which at most {most} join a batch"


def describe_epsilon(epsilon: float) -> str:
    """Return an epsilon as text with five digits, rounded up so that it does not understate.

    Example:
        >>> describe_epsilon(1.23001), describe_epsilon(math.inf)
        ('1.2301', 'infinite')
    """
    if math.isinf(epsilon):
        return "infinite"
    if epsilon <= 0:
        return "0"
    scale = 10.0 ** (4 - math.floor(math.log10(epsilon)))
    return f"{math.ceil(epsilon * scale) / scale:.5g}"


def describe_share(share: float) -> str:
    """Return a share in percent as text, rounded up so that it does not understate.

    Example:
        >>> describe_share(0.0182985), describe_share(1e-3), describe_share(1.0)
        ('1.83 %', '0.1 %', '100 %')
    """
    if share <= 0:
        return "0 %"
    digits = max(0, 2 - math.floor(math.log10(100 * share)))
    return f"{math.ceil(share * 10 ** (digits + 2) * (1 - 1e-12)) / 10**digits:.{digits + 3}g} %"


@dataclass(frozen=True)
class _Described:
    """A placeholder for a saved clipping, with its description only."""

    text: str

    @override
    def __repr__(self) -> str:
        return self.text


def stated_plan(state: Mapping[str, Any]) -> DPPlan:
    """Return a plan from a checkpoint for use in statements; its schedule and clipping cannot train again.

    Args:
        state: dictionary that ``DPPlan.state_dict`` returned.

    Raises:
        ValueError: a field is missing or of another type.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "sampling": (str,),
        "dataset_size": (int, type(None)),
        "expected_batch_size": (int,),
        "sample_rate": (float, type(None)),
        "steps": (int, type(None)),
        "noise_multiplier": (float,),
        "delta": (float,),
        "target_epsilon": (float, int, type(None)),
        "accountant": (str,),
        "neighboring_relation": (str,),
        "clipping": (str,),
    }
    for name, kind in kinds.items():
        if name not in state or not isinstance(state[name], kind):
            raise ValueError(
                f"Expected an intact plan, got {name}={state.get(name)!r}. The checkpoint is damaged or of another "
                "version of lightning_dp: use an intact one."
            )
    fields = {name: state[name] for name in kinds if name != "clipping"}
    fields["per_sample_loss"] = state.get("per_sample_loss", False) is True
    fields["batches_per_pass"] = state.get("batches_per_pass")  # plans of older versions claim no amplification
    if state.get("correlation") is not None:
        fields["correlation"] = Correlation.from_state_dict(state["correlation"])
    fields |= {"unit": state.get("unit", "record"), "records_per_unit": state.get("records_per_unit")}
    return DPPlan(**fields, clipping=cast(Clipping, _Described(state["clipping"])), steps_per_epoch=None)


def summary_line(plan: DPPlan, ledger: Ledger, accountant: Accountant) -> str:
    """Return epsilon, delta, relation, sampling, accountant and number of steps in one line."""
    if ledger.num_steps == 0:
        return "Privacy: no steps recorded."
    epsilon = accountant.epsilon(ledger, plan.delta)
    relation = describe_relation(plan.neighboring_relation, plan.unit)
    return (
        f"Privacy: (epsilon={describe_epsilon(epsilon)}, delta={plan.delta:g}) for {relation}, "
        f"{describe_sampling(plan)}, accountant {plan.accountant}, {ledger.num_steps} steps."
    )


def privacy_statement(plan: DPPlan, ledger: Ledger, accountant: Accountant, notes: RunNotes) -> str:
    """Return the privacy statement of a run: the guarantee, the settings behind it, and the exclusions.

    Args:
        plan: the public settings.
        ledger: all releases of the run.
        accountant: computes epsilon from it.
        notes: further facts to state.
    """
    lines = [summary_line(plan, ledger, accountant)]
    if ledger.num_steps:
        sigmas = sorted({entry.noise_multiplier for entry in (run.event for run in ledger.entries)})
        noise = f"{sigmas[0]:.4g}" if len(sigmas) == 1 else f"{sigmas[0]:.4g} to {sigmas[-1]:.4g}"
        lines += [
            f"  unit: {describe_unit(plan)} ({plan.dataset_size or 'unknown number of'} {plan.unit}s)",
            f"  noise multiplier: {noise} times the sensitivity; clipping: {plan.clipping!r}",
            f"  expected batch size: {plan.expected_batch_size}" + (" users" if plan.unit == "user" else ""),
        ]
        if plan.correlation is not None:
            lines.append(f"  noise: {plan.correlation.describe()}")
        if notes.kept_apart:
            lines.append(f"  samples kept apart: {'; '.join(notes.kept_apart)}")
        if plan.per_sample_loss:
            lines.append("  objective: the loss of each record by itself (per_sample_loss), not the loss of a batch")
        if math.isinf(accountant.epsilon(ledger, plan.delta)):
            lines.append(f"  epsilon is infinite: {why_infinite(ledger)}. This run is not private.")
    if notes.seeded:
        lines.append("  a seed was set: nothing here holds against someone who knows it. Train without a seed.")
    lines += [f"  {audit}" for audit in notes.audits]
    lines.append("  not covered:")
    if notes.nonprivate_logs:
        lines.append(f"    - logged without noise: {', '.join(sorted(notes.nonprivate_logs))}")
    if notes.choices:
        lines.append(f"    - chosen by un-noised figures: {', '.join(sorted(notes.choices))}")
    lines += [f"    - {item}" for item in not_covered(plan)]
    return "\n".join(lines)


def describe_sampling(plan: DPPlan) -> str:
    """Return a description of the sampling and its accounting, in words."""
    if amplifies_allocation(plan):
        return f"shuffled batches (random allocation to {plan.batches_per_pass} batches per pass)"
    if plan.sampling != "poisson":
        return f"{'cyclic' if plan.sampling == 'cyclic' else 'shuffled'} batches without amplification"
    return f"Poisson sampling at rate {plan.sample_rate:.4g}"


def amplifies_allocation(plan: DPPlan) -> bool:
    """Tell whether the plan's accountant amplifies privacy by the random allocation of records to batches."""
    return plan.allocates and ACCOUNTANTS[plan.accountant].amplifies_from < math.inf


def why_infinite(ledger: Ledger) -> str:
    """Return the reasons for an infinite epsilon of a ledger, separated by semicolons."""
    return "; ".join(sorted({run.event.reason for run in ledger.entries} - {""}) or ["some step had no noise"])
