"""The privacy statement of a DataLens run."""

from __future__ import annotations

import math

from lightning_dp.accounting import Accountant, Ledger
from lightning_dp.datalens.plan import DataLensPlan
from lightning_dp.reporting.statement import describe_epsilon, describe_relation

_COVERED = "the generator's weights and every sample it makes, at any time of training; what DataLens logs"
_NOT_COVERED = (
    "the teachers and their votes, which never leave the process",
    "validation and test data, and hyper-parameters or stops chosen by looking at the private data",
    "bounds or scalings that were computed from the private data",
)


def summary_line(plan: DataLensPlan, ledger: Ledger, accountant: Accountant) -> str:
    """Return epsilon, delta, relation, sampling, accountant and number of steps in one line."""
    if ledger.num_steps == 0:
        return "Privacy: no steps recorded."
    epsilon = accountant.epsilon(ledger, plan.delta)
    return (
        f"Privacy: (epsilon={describe_epsilon(epsilon)}, delta={plan.delta:g}) for "
        f"{describe_relation(plan.neighboring_relation)}, no sampling, accountant {accountant.name}, "
        f"{ledger.num_steps} steps."
    )


def privacy_statement(plan: DataLensPlan, ledger: Ledger, accountant: Accountant, *, seeded: bool = False) -> str:
    """Return the privacy statement of a run: the guarantee, the settings behind it, and the exclusions."""
    lines = [summary_line(plan, ledger, accountant)]
    if ledger.num_steps:
        lines += [
            f"  unit: one record of the training set ({plan.dataset_size} records, {plan.num_teachers} teachers with "
            f"{plan.shard_size} each)",
            f"  noise on each sum of votes: {plan.noise_std:.5g}, for {plan.num_teachers} teachers with {plan.top_k} "
            f"votes on each of {plan.batch_size} samples a step",
        ]
        if math.isinf(accountant.epsilon(ledger, plan.delta)):
            lines.append("  epsilon is infinite: some step had no noise. This run is not private.")
    if seeded:
        lines.append("  a seed was set: nothing here holds against someone who knows it. Train without a seed.")
    lines += [f"  covered: {_COVERED}", "  not covered:", *(f"    - {item}" for item in _NOT_COVERED)]
    return "\n".join(lines)
