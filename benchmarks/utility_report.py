"""Section and plot of ``utility.py``, made from its results alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import COLOURS, panels, save, tidy
from benchmarks.methods import BASELINE, METHODS, NON_PRIVATE
from benchmarks.stats import THRESHOLD, chance_of_false_call, difference, listed, markdown_table, mean_of
from benchmarks.tasks import TASKS

Results = dict[str, Any]
Cell = tuple[str, str]  # dataset, epsilon
VERDICTS = ("higher", "lower", "within noise")


def cells(results: Results) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yield data set and epsilon with the methods' entries, in the order of the table; without privacy left out.

    Every data set comes with every epsilon of the file, whether or not its runs are done.
    """
    epsilons = {key for by_epsilon in results.values() for key in by_epsilon if key != "none"}
    for dataset in TASKS:
        for epsilon in sorted(epsilons, key=float):
            yield (dataset, epsilon), results.get(dataset, {}).get(epsilon, {})


def datasets_of(results: Results) -> list[str]:
    """Return the data sets with a finished method."""
    done = {dataset for (dataset, _), row in cells(results) if finished(row)}
    return [dataset for dataset in TASKS if dataset in done]


def finished(row: dict[str, Any]) -> list[str]:
    """Return the methods of a cell with at least two reported seeds, in the order of the table."""
    return [name for name in METHODS if name in row and len(row[name]["report"]) > 1]


def verdict_of(row: dict[str, Any], method: str, other: str) -> str:
    """Return whether a method's accuracy is higher or lower than another's, or within noise of it."""
    return difference(row[method]["report"], row[other]["report"]).verdict


def tables(results: Results) -> Iterator[str]:
    """Return one table per data set."""
    for dataset in datasets_of(results):
        epsilons = [epsilon for (name, epsilon), _ in cells(results) if name == dataset]
        header = [dataset]
        for epsilon in epsilons:
            header += [f"epsilon {epsilon}", "rate", "minus flat", "so it is"]
        lines = [_line(results[dataset], epsilons, method) for method in METHODS]
        yield markdown_table(header, [line for line in lines if any(line[1:])])


def _line(by_epsilon: dict[str, Any], epsilons: list[str], method: str) -> list[str]:
    line = [method]
    for epsilon in epsilons:
        row = by_epsilon.get("none" if method == NON_PRIVATE else epsilon, {})
        if method not in finished(row):
            line += [""] * 4
            continue
        place = row[method]
        line += [str(mean_of(place["report"].values())), f"{place['lr']:g}"]
        if method in (NON_PRIVATE, BASELINE) or BASELINE not in finished(row):
            line += ["", ""]
        else:
            change = difference(place["report"], row[BASELINE]["report"])
            line += [str(change), change.verdict]
    return line


def against_baseline(results: Results) -> Iterator[str]:
    """Return one sentence per cell, and one over all cells."""
    counts = {verdict: dict.fromkeys(METHODS, 0) for verdict in VERDICTS}
    num_cells = 0
    for (dataset, epsilon), row in cells(results):
        done = finished(row)
        if BASELINE not in done:
            continue
        num_cells += 1
        found: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
        for method in (name for name in done if name != BASELINE):
            verdict = verdict_of(row, method, BASELINE)
            found[verdict].append(method)
            counts[verdict][method] += 1
        yield (
            f"- {dataset}, epsilon {epsilon}: helps: {listed(found['higher'])}. Costs: {listed(found['lower'])}. "
            f"Within noise: {listed(found['within noise'])}."
        )
    always = [name for name in METHODS if num_cells and counts["higher"][name] == num_cells]
    often = [
        f"{name} ({counts['higher'][name]} higher, {counts['lower'][name]} lower)"
        for name in METHODS
        if name not in always and counts["higher"][name] > counts["lower"][name]
    ]
    rarely = [
        f"{name} ({counts['higher'][name]} higher, {counts['lower'][name]} lower)"
        for name in METHODS
        if counts["lower"][name] > counts["higher"][name]
    ]
    yield (
        f"- Over the {num_cells} cells: better than flat clipping in all: {listed(always)}. More often better than "
        f"worse: {listed(often)}. More often worse than better: {listed(rarely)}. The other methods: as often one as "
        "the other."
    )


def against_controls(results: Results) -> Iterator[str]:
    """Return the remaining gain of each method over its own control, one sentence each."""
    for method in (method for method in METHODS.values() if method.control):
        found: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
        for (dataset, epsilon), row in cells(results):
            if {method.name, method.control} <= set(finished(row)):
                found[verdict_of(row, method.name, method.control)].append(f"{dataset} at {epsilon}")
        yield (
            f"- {method.name} against its control, {method.control}: higher on {listed(found['higher'])}; lower on "
            f"{listed(found['lower'])}; within noise on {listed(found['within noise'])}."
        )


def caveats(results: Results) -> str:
    """Return the limits of the figures: chance, the grid's ends, missing runs."""
    seeds, ends, missing, spent, comparisons = set(), [], [], [], 0
    for (dataset, epsilon), row in cells(results):
        done = finished(row)
        absent = [name for name in METHODS if name not in (*done, NON_PRIVATE)]
        comparisons += max(0, len(done) - 1)
        if absent:
            missing.append(f"{dataset} at {epsilon} ({len(absent)} of {len(METHODS) - 1} methods)")
        for name in done:
            rates = sorted(float(rate) for rate in row[name]["choice"])
            seeds.add(len(row[name]["report"]))
            spent.append(row[name]["epsilon"] / float(epsilon))
            if row[name]["lr"] in (rates[0], rates[-1]):
                ends.append(f"{name} ({dataset} at {epsilon}, {row[name]['lr']:g})")
    if not seeds:
        return "No cell is finished."
    chance = chance_of_false_call(min(seeds))
    counted = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    return (
        f"{counted} seeds; a difference is called one beyond {THRESHOLD:g} standard errors of the paired differences. "
        f"Between equals that happens in {100 * chance:.0f} % of comparisons, so about {chance * comparisons:.0f} of "
        f"the {comparisons} against flat clipping are chance, and a single call is no proof. The errors are of seeds "
        f"on one split, not of the choice of the test records. Every run ended at {100 * min(spent):.1f} to "
        f"{100 * max(spent):.1f} % of its epsilon. Best rate at an end of the grid: {listed(ends)}. Not finished: "
        f"{listed(missing)}."
    )


def section(results: Results) -> str:
    """Return the section of the README."""
    sizes = "; ".join(
        f"{task.name}: {len(task.for_report.train)} training and {task.test_size} test records, batch "
        f"{task.batch_size}, {task.epochs} epochs, {sum(p.numel() for p in task.make_network().parameters())} "
        "parameters"
        for task in TASKS.values()
        if task.name in datasets_of(results)
    )
    intro = (
        "Accuracy on the test split after the last epoch, mean and standard error. Delta 1e-5, SGD without momentum, "
        "bound 1. Each method has its own best rate of one public grid, chosen on validation records with seeds that "
        f"are not reported; that choice is not covered by epsilon. {sizes}."
    )
    parts = [intro, *tables(results), "\n".join(against_baseline(results)), "\n".join(against_controls(results))]
    picture = "![accuracy of each method at both epsilons](utility.png)"
    return "\n\n".join([*parts, caveats(results), picture])


def plot(results: Results, target: Path) -> None:
    """Draw accuracy and standard error of every method, one panel per data set."""
    datasets = datasets_of(results)
    figure, (axes,) = panels(1, len(datasets), 1.8 + 3.3 * len(datasets), 5.2, sharey=True)
    names = [name for name in METHODS if name != NON_PRIVATE]
    for axis, dataset in zip(axes, datasets, strict=True):
        own = [(epsilon, row) for (name, epsilon), row in cells(results) if name == dataset]
        for number, (epsilon, row) in enumerate(own):
            colour, shift = COLOURS[number % len(COLOURS)], 0.12 * (2 * number - len(own) + 1)
            done = [name for name in finished(row) if name in names]
            means = [mean_of(row[name]["report"].values()) for name in done]
            axis.errorbar(
                [mean.value for mean in means],
                [names.index(name) + shift for name in done],
                xerr=[mean.error for mean in means],
                fmt="o",
                color=colour,
                markersize=4,
                label=f"epsilon {epsilon}",
            )
            if BASELINE in done:
                axis.axvline(means[done.index(BASELINE)].value, color=colour, linestyle=":", linewidth=1)
        plain = results[dataset].get("none", {})
        if NON_PRIVATE in finished(plain):
            value = mean_of(plain[NON_PRIVATE]["report"].values()).value
            axis.axvline(value, color="tab:grey", linestyle="--", linewidth=1, label="without privacy")
        tidy(axis, title=dataset, x="test accuracy", y="")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, target)
