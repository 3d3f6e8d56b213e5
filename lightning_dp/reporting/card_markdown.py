"""The privacy card as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_dp.reporting import statement

#: Runs of equal noise that are listed; the rest is in the JSON.
NUM_LISTED = 12


def to_markdown(card: Mapping[str, Any], *, plot: str | None = None) -> str:
    """Return the card as Markdown.

    Args:
        card: dictionary that ``privacy_card`` returned.
        plot: name of the file with the plot of epsilon and attacks; None prints epsilon over steps as a table.
    """
    definition, accounting, mechanism = card["definition"], card["accounting"], card["mechanism"]
    size = "unknown" if definition["dataset_size"] is None else definition["dataset_size"]
    sections = [
        f"# Privacy card\n\n{card['statement']}",
        _table(
            "Definition",
            {
                "setting": f"{card['setting']}: whoever trains sees the records and is trusted",
                "data accesses covered": definition["data_accesses"],
                "what is protected": definition["mechanism_output"],
                "unit": f"{definition['unit']} ({size} {definition['counted_as']}s)",
                "neighbouring data sets": (
                    f"{definition['neighboring_datasets']} (`{definition['neighboring_relation']}`)"
                ),
            },
        ),
        _table(
            "Accounting",
            {
                "epsilon, delta": f"{_shown(card['epsilon'])}, {card['delta']:g}",
                "type": f"{accounting['type']} (`{accounting['accountant']}`), computed by {accounting['computed_by']}",
                "assumptions": accounting["assumptions"],
                "do they hold": "yes" if accounting["assumptions_hold"] else "no: a seed was set",
                "steps": accounting["steps"],
                "target epsilon": accounting["target_epsilon"] or "none: the noise was given",
            },
        ),
        _attack_section(card["attacks"], definition["counted_as"]),
        _table(
            "Mechanism",
            {
                "sampling": mechanism["sampling"],
                "expected batch size": mechanism["expected_batch_size"],
                "clipping": f"`{mechanism['clipping']}`",
                "noise": mechanism["noise_generator"],
                "decided by callbacks": "; ".join(f"`{part}`" for part in mechanism["callbacks"]) or "nothing",
                "samples kept apart": "; ".join(mechanism["samples_kept_apart"]) or "not stated",
            },
        ),
        _noise_table(mechanism["noise_over_steps"]),
        _curve_section(accounting["epsilon_over_steps"], plot),
        "## Not covered\n\n" + "\n".join(f"- {item}" for item in card["not_covered"]),
        "## Software\n\n" + ", ".join(f"{name} {release}" for name, release in card["software"].items()),
        "Items and order after Ponomareva et al. 2023, *How to DP-fy ML*, section 5.3.",
    ]
    return "\n\n".join(sections) + "\n"


def _shown(value: float | str) -> str:
    return statement.describe_epsilon(float(value))


def _table(title: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _attack_section(attacks: Mapping[str, Any], unit: str) -> str:
    """Return the card's section on the success of the best attack."""
    lines = [
        "## Attacks\n",
        f"Whoever sees everything that was released, knows all other {unit}s and wants to tell whether one {unit} was "
        "used:\n",
        "| wrong claims (false positive rate) | right claims (true positive rate), at most |",
        "|---|---|",
        *(
            f"| {statement.describe_share(wrong)} | {statement.describe_share(right)} |"
            for wrong, right in attacks["largest_true_positive_rates"]
        ),
        "",
        "The largest advantage, right claims less wrong ones, is "
        f"{statement.describe_share(attacks['largest_advantage'])}. Computed from {attacks['computed_from']}, for any "
        "attack.",
    ]
    return "\n".join(lines)


def _noise_table(runs: list[dict[str, Any]]) -> str:
    lines = ["## Noise over steps\n", "| steps | noise multiplier |", "|---|---|"]
    first = 1
    for run in runs[:NUM_LISTED]:
        last = first + run["steps"] - 1
        lines.append(f"| {first} to {last} | {_cell(run['note']) or format(run['noise_multiplier'], '.5g')} |")
        first = last + 1
    if len(runs) > NUM_LISTED:
        lines.append(f"| from {first} on | {len(runs) - NUM_LISTED} more runs of equal noise, in the JSON |")
    return "\n".join(lines)


def _curve_section(points: list[list[Any]], plot: str | None) -> str:
    title = "## Epsilon over steps\n\n"
    if plot is not None:
        return f"{title}![epsilon over steps, and the success of attacks]({plot})"
    lines = ["| step | epsilon |", "|---|---|", *(f"| {step} | {_shown(value)} |" for step, value in points)]
    return title + "No plot: matplotlib is not installed.\n\n" + "\n".join(lines)
