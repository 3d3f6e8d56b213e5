"""The accuracy of each method at the same epsilon, each at its own best learning rate from one public grid.

    python benchmarks/utility.py                                  # extends utility.json, about an hour of one core
    python benchmarks/utility.py --datasets digits --epsilons 1 --methods flat AUTO-S --seeds 5
    python benchmarks/utility.py --report                         # table and plot from the file, no runs

Rates are chosen on validation records, with two seeds that are not reported. Then a run a reported seed trains on the
whole training split and is judged once, after its last epoch, on the test split. Sampling and noise come from the
operating system's entropy, so a seed fixes split, weights and masks only. Finished runs are kept: a second call does
the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import utility_report
from benchmarks.choice import CHOICE_SEEDS, best_rate
from benchmarks.methods import BASELINE, METHODS, NON_PRIVATE
from benchmarks.readme import write_section
from benchmarks.tasks import TASKS, Classifier, accuracy, be_quiet, train
from lightning_dp import DPStrategy

HERE = Path(__file__).parent
DELTA = 1e-5
GRID = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SMOKE_METHODS = [NON_PRIVATE, BASELINE, "flat, lr decay", "sparsification .9"]
SECONDS_BETWEEN_SAVES = 5.0
Results = dict[str, Any]


#: noise multipliers that ``target_epsilon`` has led to in this process, by what they depend on: the second run need not
#: search
_calibrated: dict[tuple[Any, ...], float] = {}


class Run(NamedTuple):
    """One training run; ``report`` says which records judge it."""

    dataset: str
    epsilon: float | None
    method: str
    lr: float
    seed: int
    report: bool
    epochs: int | None = None


def execute(run: Run) -> tuple[Run, float, float | None]:
    """Train once.

    Returns:
        The run, its accuracy after the last epoch, and the epsilon spent.
    """
    task, method = TASKS[run.dataset], METHODS[run.method]
    split = task.for_report if run.report else task.for_choice
    module = Classifier(task.make_network, lr=run.lr, decay=method.decay, seed=run.seed)
    strategy, known = None, (run.dataset, run.epsilon, run.report, method.schedule, run.epochs)
    if run.epsilon is not None:
        noise = {"noise_multiplier": _calibrated[known]} if known in _calibrated else {"target_epsilon": run.epsilon}
        strategy = DPStrategy(target_delta=DELTA, **noise, **method.options)
    callbacks = method.callbacks(task, run.seed)
    train(task, module, split.train, strategy=strategy, callbacks=callbacks, epochs=run.epochs)
    if strategy is None:
        return run, accuracy(module, split.held_out), None
    _calibrated[known] = strategy.plan.noise_multiplier
    spent = strategy.epsilon()
    assert run.epsilon is not None
    assert spent <= run.epsilon, f"Expected epsilon <= {run.epsilon}, got {spent} with {run}."
    return run, accuracy(module, split.held_out), spent


def cell(results: Results, dataset: str, epsilon: float | None, method: str) -> dict[str, Any]:
    """Return the entry of one method's runs: ``choice`` by rate and seed, ``report`` by seed."""
    row = results.setdefault(dataset, {}).setdefault(key_of(epsilon), {})
    return row.setdefault(method, {"choice": {}, "report": {}})


def key_of(epsilon: float | None) -> str:
    """Return the name of an epsilon in the file."""
    return "none" if epsilon is None else f"{epsilon:g}"


def note(results: Results, run: Run, figure: float, spent: float | None) -> None:
    """Enter a finished run."""
    place = cell(results, run.dataset, run.epsilon, run.method)
    if run.report:
        place["lr"] = run.lr
        place["report"][str(run.seed)] = round(figure, 4)
        if spent is not None:
            place["epsilon"] = max(place.get("epsilon", 0.0), round(spent, 4))
    else:
        place["choice"].setdefault(f"{run.lr:g}", {})[str(run.seed)] = round(figure, 4)


def missing_choices(results: Results, dataset: str, units: list[tuple[float | None, str]], options: Any) -> list[Run]:
    """Return runs of the grid that are not in the file."""
    return [
        Run(dataset, epsilon, method, lr, seed, False, options.epochs)
        for epsilon, method in units
        for lr in options.grid
        for seed in CHOICE_SEEDS
        if str(seed) not in cell(results, dataset, epsilon, method)["choice"].get(f"{lr:g}", {})
    ]


def missing_reports(results: Results, dataset: str, units: list[tuple[float | None, str]], options: Any) -> list[Run]:
    """Return reported runs that are not in the file, each at its method's best rate, seed by seed.

    Runs at a rate that a wider grid has since bettered are dropped.
    """
    rates: dict[tuple[float | None, str], float] = {}
    for unit in units:
        place = cell(results, dataset, *unit)
        rates[unit] = best_rate(place["choice"])
        if place.get("lr", rates[unit]) != rates[unit]:
            place["report"] = {}
    return [
        Run(dataset, *unit, rate, seed, True, options.epochs)
        for seed in range(options.seeds)
        for unit, rate in rates.items()
        if str(seed) not in cell(results, dataset, *unit)["report"]
    ]


def save(results: Results, out: Path) -> None:
    """Write the file so that an interruption leaves the old or the new one."""
    partial = out.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    partial.replace(out)


def run_all(options: argparse.Namespace) -> Results:
    """Run all missing runs, one data set at a time: first the choice of rates, then the reported runs."""
    results: Results = json.loads(options.out.read_text()) if options.out.exists() else {}
    with contextlib.ExitStack() as stack:
        finished: Any = map
        if options.workers:
            pool = multiprocessing.get_context("spawn").Pool(options.workers, initializer=be_quiet)
            finished = stack.enter_context(pool).imap_unordered
        for dataset in options.datasets:
            units = [
                (epsilon, method) for epsilon in options.epsilons for method in options.methods if method != NON_PRIVATE
            ]
            units += [(None, NON_PRIVATE)] if NON_PRIVATE in options.methods else []
            for find in (missing_choices, missing_reports):
                runs = find(results, dataset, units, options)
                began = saved = time.monotonic()
                for run, figure, spent in finished(execute, runs):
                    note(results, run, figure, spent)
                    if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                        save(results, options.out)
                        saved = time.monotonic()
                save(results, options.out)
                print(
                    f"{dataset}: {len(runs)} runs of {find.__name__[8:]} in {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=10, help="how many are reported, counted from 0")
    parser.add_argument("--grid", nargs="+", type=float, default=list(GRID), help="learning rates")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each; 0: this one")
    parser.add_argument("--out", type=Path, default=HERE / "utility.json")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    parser.add_argument("--report", action="store_true", help="no runs: section and plot from the file")
    parser.add_argument("--smoke", action="store_true", help="the smallest runs of everything")
    options = parser.parse_args(arguments)
    be_quiet()
    options.epochs = 1 if options.smoke else None
    if options.smoke:
        options.datasets, options.epsilons, options.methods = ["digits"], [3.0], SMOKE_METHODS
        options.seeds, options.grid = 2, [1.0]
    if not options.report:
        run_all(options)
    results: Results = json.loads(options.out.read_text())
    utility_report.plot(results, options.out.with_suffix(".png"))
    write_section("utility", utility_report.section(results), readme=options.readme)


if __name__ == "__main__":
    main()
