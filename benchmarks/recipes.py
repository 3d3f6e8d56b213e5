"""A search of private training recipes on validation records, and their accuracy on the test split.

    python benchmarks/recipes.py --minutes 60    # extends recipes.jsonl
    python benchmarks/recipes.py --report        # the tables of docs/recipes.md, no runs
    python benchmarks/recipes.py --again adult 3 # train the recipe at epsilon 3 once more, print its test accuracy

The search, written down before it ran: at epsilon 3 one number after the other is tried over its grid (rate, epochs,
batch, clipping bound, decay of the rate, momentum), the best mean accuracy of the seeds of the search on the validation
records is kept, ties go to the first tried. While the best value of rate, epochs or batch is at an end of its grid, the
grid grows by one value at that end, at most twice. When the bound or the momentum changes, the rate changes with it so
that the size of a step stays. Epsilon 1 and 8 start from the recipe for 3 and search the rate only, around the best for
3 (rate and epochs were planned; after eight runs it was seen that two cores carry no more). Then each recipe trains on
the whole training split with seeds that the search did not use, and is judged once each on the test split.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.readme import write_section
from benchmarks.runs import Results, Run, execute
from benchmarks.stats import markdown_table
from benchmarks.tasks import be_quiet

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "recipes.md"
SEARCH_SEEDS, SEEDS = (100,), (0, 1, 2)
GRIDS: dict[str, tuple[float, ...]] = {
    "lr": (0.5, 1.0, 2.0, 4.0),
    "epochs": (10, 20, 40),
    "batch": (2048, 4096, 8192),
    "clip": (0.1, 1.0),
    "decay": (False, True),
    "momentum": (0.0, 0.9),
}
#: Rates tried at the other epsilons, as multiples of the rate at epsilon 3.
NEARBY = {1.0: (0.25, 0.5, 1.0), 8.0: (0.5, 1.0, 2.0)}
GROWING = ("lr", "epochs", "batch")


class Unfinished(Exception):
    """The time budget ended within a search."""


@dataclass(frozen=True)
class Task:
    """One model on one data set.

    Args:
        title: of its table.
        start: recipe that the search begins with.
        grids: values of each number where they differ from ``GRIDS``.
    """

    title: str
    start: Run
    grids: dict[str, tuple[float, ...]]


FASHION = Run("fashion_mnist:waves", "waves linear", 20, 4096, 1.0, epsilon=3.0, clip=1.0)
ADULT = Run("adult", "adult linear", 20, 1024, 1.0, epsilon=3.0, clip=1.0)
SMALL = {"batch": (512, 1024, 2048)}
TASKS = {
    "fashion_mnist": Task("Fashion-MNIST, linear on wavelet features", FASHION, {}),
    "adult": Task("Adult, linear", ADULT, SMALL),
    "movies": Task(
        "Film reviews, linear on embeddings of a frozen MiniLM",
        Run("movies:minilm", "text linear", 20, 512, 8.0, epsilon=3.0, clip=1.0),
        {"lr": (2.0, 4.0, 8.0, 16.0), "batch": (256, 512, 1024)},
    ),
}


def changed(run: Run, name: str, value: float) -> Run:
    """Return the recipe with another value of one number; if the number scales the step size, keep that."""
    rate = run.lr
    if name == "clip":
        rate = run.lr * run.clip / value
    if name == "momentum":
        rate = run.lr * (1 - value) / (1 - run.momentum)
    kinds = {"epochs": int, "batch": int, "decay": bool}
    return run.but(**{"lr": round(rate, 6), name: kinds.get(name, float)(value)})


def grown(grid: list[float], best: float) -> float | None:
    """Return the value beyond the end of a grid, if the best value is at that end; None if it is inside."""
    if best == grid[0]:
        return grid[0] / 2
    return grid[-1] * 2 if best == grid[-1] else None


def search(start: Run, grids: Mapping[str, tuple[float, ...]], results: Results, until: float) -> Run:
    """Return the recipe found by one pass over the numbers.

    Args:
        start: recipe that the search begins with.
        grids: name of a number -> values tried first, in the order of the pass.
        results: finished runs.
        until: no run starts after this time.

    Raises:
        Unfinished: the time budget ended first.
    """
    best = start
    for name, values in grids.items():
        grid = list(values)
        for growth in range(3 if name in GROWING else 1):
            runs = {value: changed(best, name, value) for value in grid}
            for seed in SEARCH_SEEDS:
                if not results.fill([run.but(seed=seed) for run in runs.values()], until=until):
                    raise Unfinished
            winner = max(grid, key=lambda value: results.mean(runs[value], SEARCH_SEEDS).value)  # type: ignore[union-attr]
            more = grown(sorted(grid), winner) if growth < 2 else None
            if name not in GROWING or more is None:
                break
            grid.append(more)
        best = runs[winner]
    return best


def recipes(task: Task, results: Results, until: float) -> Iterator[Run]:
    """Return the recipe at each epsilon; that for 3 comes first, and the others start from it."""
    base = search(task.start, GRIDS | task.grids, results, until)
    yield base
    for epsilon, nearby in NEARBY.items():
        yield search(base.but(epsilon=epsilon), {"lr": tuple(base.lr * factor for factor in nearby)}, results, until)


def table(task: Task, results: Results) -> str:
    """Return recipes and accuracies as Markdown; the last row names the epsilons that were not searched."""
    rows = []
    try:
        for run in recipes(task, results, until=0.0):
            mean, choice = results.mean(run.but(report=True), SEEDS), results.mean(run, SEARCH_SEEDS)
            assert choice is not None
            line = results.lines[run.but(seed=SEARCH_SEEDS[0])]
            shown = f"{100 * mean.value:.2f} ± {100 * mean.error:.2f} ({mean.count})" if mean else "not run"
            rate = f"{run.lr:g}" + (" to 0" if run.decay else "")
            rows.append(
                [
                    f"{run.epsilon:g}",
                    run.batch,
                    run.epochs,
                    f"{run.clip:g}",
                    rate,
                    f"{run.momentum:g}",
                    f"{line['sigma']:.2f}",
                    f"{100 * choice.value:.2f}",
                    shown,
                ]
            )
    except Unfinished:
        left = [f"{epsilon:g}" for epsilon in (task.start.epsilon, *NEARBY)][len(rows) :]
        rows.append([f"{' and '.join(left)}: not searched", *[""] * 8])
    header = [
        "epsilon",
        "batch",
        "epochs",
        "bound",
        "rate",
        "momentum",
        "sigma (search)",
        "validation, %",
        "test, % (seeds)",
    ]
    return f"**{task.title}**\n\n{markdown_table(header, rows)}\n"


def again(name: str, epsilon: str, results: Results) -> str:
    """Train one recipe of the page with the first reported seed; return its accuracy on the test split."""
    for run in recipes(TASKS[name], results, until=0.0):
        if run.epsilon == float(epsilon):
            outcome = execute(run.but(report=True, seed=SEEDS[0]))
            return f"{TASKS[name].title}: {100 * outcome['accuracy']:.2f} % at epsilon {outcome['epsilon']['pld']}"
    raise ValueError(f"Expected an epsilon of the page, got epsilon={epsilon}. Choose 1, 3 or 8.")


def cost_of(lines: Collection[Mapping[str, Any]]) -> str:
    """Return number, cost, machines and commits of some runs."""
    machines = sorted({line["machine"] for line in lines})
    commits = list(dict.fromkeys(line["commit"] for line in lines))
    return (
        f"{len(lines)} runs, {sum(line['processor_seconds'] for line in lines) / 60:.1f} minutes of one core and "
        f"{sum(line['seconds'] for line in lines) / 60:.1f} of wall clock on a machine that others used "
        f"({'; '.join(machines)}); commits {', '.join(commits)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="no run starts after so many")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--epsilons", type=int, default=3, help="how many of 3, 1 and 8, in this order")
    parser.add_argument("--again", nargs=2, metavar=("TASK", "EPSILON"), help="train one recipe of the page again")
    parser.add_argument("--report", action="store_true", help="no runs: the tables of docs/recipes.md")
    options = parser.parse_args()
    be_quiet()
    results, until = Results(HERE / "recipes.jsonl"), time.time() + 60 * options.minutes
    if options.again:
        print(again(*options.again, results))
        return
    for task in () if options.report else [TASKS[name] for name in options.tasks]:
        try:
            for run in itertools.islice(recipes(task, results, until), options.epsilons):
                results.fill([run.but(report=True, seed=seed) for seed in SEEDS], until=until)
        except Unfinished:
            print(f"{task.title}: the time budget ended; call again")
    cost = f"{cost_of(results.lines.values())} Each run is a line of `benchmarks/recipes.jsonl`."
    write_section(
        "recipes",
        "\n".join(table(task, results) for task in TASKS.values()) + "\n" + textwrap.fill(cost, 120),
        readme=PAGE,
    )


if __name__ == "__main__":
    main()
