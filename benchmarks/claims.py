"""Claims of papers on private training, tried on Fashion-MNIST in sizes that two cores can run.

    python benchmarks/claims.py --minutes 60           # extends claims.jsonl, then writes claims.md
    python benchmarks/claims.py --studies pruning      # one study
    python benchmarks/claims.py --report               # the page only

Each arm has its own learning rate: the best of one grid on the validation records with a seed that is not reported.
Then each arm trains with the reported seeds on the whole training split and is judged once each on the test split.
Written down before any run: a difference beyond two standard errors of the paired differences counts, a smaller one is
open; a best rate at an end of the grid adds one rate there, at most twice; studies run in the order of this file until
the time budget ends. Changed once, after validation accuracies of one arm and before any test accuracy: all grids of
rates were raised.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.recipes import Unfinished, grown
from benchmarks.runs import Results, Run
from benchmarks.stats import difference, markdown_table
from benchmarks.tasks import be_quiet

HERE = Path(__file__).parent
SEARCH_SEED, SEEDS = 100, (0, 1, 2)


@dataclass(frozen=True)
class Study:
    """One claim and the arms that test it.

    Args:
        claim: what the paper says.
        setting: of the runs.
        arms: name -> run at any rate.
        grid: learning rates, the same for every arm.
        pairs: (arm, its control, and the sign that the difference has if the claim holds).
    """

    claim: str
    setting: str
    arms: dict[str, Run]
    grid: tuple[float, ...]
    pairs: tuple[tuple[str, str, int], ...]


FLAT = Run("fashion_mnist", "tanh mlp", 6, 1024, 1.0, epsilon=3.0)
WIDE = Run("fashion_mnist", "wide cnn", 5, 2048, 1.0, epsilon=3.0, decay=True)
SWITCH = Run("fashion_mnist", "tanh mlp", 6, 1024, 1.0, sigma=2.0)
PRUNE = Run("fashion_mnist", "mlp 64", 4, 2048, 1.0, epsilon=3.0, decay=True)
SCHEDULES = ("noise step .85", "noise exponential .1", "auto threshold 3", "quantile .5")
MNIST_SCHEDULES = ("noise step .85", "noise time .1", "noise linear .5", *SCHEDULES[1:])
VOTES = Run("mnist", "tanh mlp 16", 4, 1024, 1.0, epsilon=3.0)


def _sparse(epsilon: float) -> Study:
    dense = WIDE.but(epsilon=epsilon)
    return Study(
        "Random sparsification with gradual cooling to .9 beats dense DP-SGD with its best schedule of the rate (Zhu "
        "& Blaschko 2023).",
        f"epsilon {epsilon:g}, convolutional network of 509,226 parameters, batch 2,048, 5 epochs (the paper: 48); the "
        "claim holds only if it does against both schedules of the dense rate.",
        {
            "dense, rate to 0": dense,
            "dense, constant rate": dense.but(decay=False),
            "sparse .9": dense.but(decay=False, method="sparse .9"),
        },
        (4.0, 8.0, 16.0),
        (("sparse .9", "dense, rate to 0", 1), ("sparse .9", "dense, constant rate", 1)),
    )


def _pruning(widths: tuple[int, ...] = (64, 256, 512)) -> Study:
    arms = {f"width {w}": PRUNE.but(network=f"mlp {w}") for w in widths}
    arms |= {
        f"width {w}, {a:g} pruned": PRUNE.but(network=f"mlp {w}", method=f"prune {a:g}") for w in widths for a in (0.9,)
    }
    return Study(
        "Heavy pruning before training helps large networks (Watson et al. 2023).",
        "perceptron 784-w-w-10, batch 2,048, 4 epochs, epsilon 3; the .9 of the weights smallest at the start are "
        "removed.",
        arms,
        (1.0, 2.0, 4.0),
        tuple((f"width {w}, 0.9 pruned", f"width {w}", 1) for w in widths),
    )


STUDIES = {
    "sparsification at epsilon 3": _sparse(3.0),
    "stages": Study(
        "Later epochs decide: privacy in the second half of a run costs more than in the first (Watson et al. 2023).",
        "perceptron 784-128-10 with tanh, batch 1,024, 6 epochs, sigma 2 where private, one rate for both "
        "halves; only the arm that is private throughout is a private run.",
        {
            "private throughout": SWITCH,
            "never private": SWITCH.but(sigma=None),
            "private in the second half": SWITCH.but(method="private from 3"),
            "private in the first half": SWITCH.but(method="private until 3"),
        },
        (0.5, 1.0, 2.0),
        (("private in the second half", "private in the first half", -1),),
    ),
    "schedules": Study(
        "A noise multiplier that decays, or a threshold learned from released values, beats constant ones at the same "
        "epsilon (sound variants of Auto DP-SGD, Chilukoti et al. 2023).",
        "perceptron 784-128-10 with tanh, batch 1,024, 6 epochs, epsilon 3.",
        {"flat": FLAT, **{name: FLAT.but(method=name) for name in SCHEDULES}},
        (1.0, 2.0, 4.0),
        tuple((name, "flat", 1) for name in SCHEDULES),
    ),
    "parts": Study(
        "Clipping hurts more than noise (Watson et al. 2023).",
        "the network, batch and sigma of stages; with one of the two switched off the runs are not private.",
        {
            "clipping and noise": SWITCH,
            "clipping only": SWITCH.but(sigma=0.0),
            "noise only": SWITCH.but(clipping="none"),
        },
        (0.5, 1.0, 2.0),
        (("clipping only", "noise only", -1),),
    ),
    "sparsification at epsilon 1": _sparse(1.0),
    "pruning": _pruning(),
    "schedules on MNIST": Study(
        "A noise multiplier that decays, or a threshold learned from released values, beats constant ones at the same "
        "epsilon (sound variants of Auto DP-SGD, Chilukoti et al. 2023).",
        "MNIST, perceptron 784-128-10 with tanh, batch 1,024, 6 epochs, epsilon 3.",
        {
            "flat": FLAT.but(data="mnist"),
            **{name: FLAT.but(data="mnist", method=name) for name in MNIST_SCHEDULES},
        },
        (2.0, 4.0, 8.0),
        tuple((name, "flat", 1) for name in MNIST_SCHEDULES),
    ),
    "votes": Study(
        "Votes on the coordinates in which a gradient is largest (TopAgg, Wang et al. 2021) beat clipped gradients in "
        "DP-SGD.",
        "MNIST, perceptron 784-16-10 with tanh, 12,730 weights, batch 1,024, 4 epochs, epsilon 3; each record votes on "
        "a tenth of the weights with stochastic signs.",
        {
            "flat": VOTES,
            "votes": VOTES.but(clipping="top .1"),
        },
        (2.0, 4.0, 8.0),
        (("votes", "flat", 1),),
    ),
}


def chosen(study: Study, results: Results, until: float) -> dict[str, Run]:
    """Return each arm at its best rate.

    Raises:
        Unfinished: the time budget ended first.
    """
    best = {}
    for name, arm in study.arms.items():
        grid = list(study.grid)
        for growth in range(3):
            runs = {rate: arm.but(lr=rate, seed=SEARCH_SEED) for rate in grid}
            if not results.fill(runs.values(), until=until):
                raise Unfinished
            rate = max(grid, key=lambda rate: results.lines[runs[rate]]["accuracy"])
            more = grown(sorted(grid), rate)
            if growth == 2 or more is None:
                break
            grid.append(more)
        best[name] = arm.but(lr=rate, report=True)
    return best


def verdict(first: Mapping[str, float], second: Mapping[str, float], sign: int) -> tuple[str, str]:
    """Return the paired difference in per cent, and whether the claim holds by the rule of this file."""
    if len(first.keys() & second.keys()) < 2:
        return "not run", "not run"
    found = difference(first, second)
    value, error = found.mean.value, found.mean.error
    says = "open" if found.verdict == "within noise" else "holds" if sign * value > 0 else "does not hold"
    return f"{100 * value:+.2f} ± {100 * error:.2f}", says


def at_end(arm: Run, best: Run, results: Results) -> bool:
    """Tell whether the best rate of an arm is the smallest or the largest that was tried."""
    tried = [run.lr for run in results.lines if run == arm.but(lr=run.lr, seed=SEARCH_SEED)]
    return best.lr in (min(tried), max(tried))


def section(name: str, results: Results) -> str:
    """Return one study as Markdown."""
    study = STUDIES[name]
    text = f"## {name}\n\nClaim: {study.claim}\n\nSetting: {study.setting}\n\n"
    try:
        best = chosen(study, results, until=0.0)
    except Unfinished:
        return text + "Not run.\n"
    ends = [arm for arm, run in best.items() if at_end(study.arms[arm], run, results)]
    rows, seconds = [], 0.0
    for arm, run in best.items():
        mean, lines = results.mean(run, SEEDS), [results.lines.get(run.but(seed=seed)) for seed in SEEDS]
        spent = {line["epsilon"].get("pld", "inf") for line in lines if line}
        seconds += sum(line["seconds"] for line in lines if line)
        shown = f"{100 * mean.value:.2f} ± {100 * mean.error:.2f} ({mean.count})" if mean else "not run"
        rate = f"{run.lr:g}" + (", an end of the grid" if arm in ends else "")
        rows.append([arm, rate, shown, ", ".join(str(value) for value in sorted(spent, key=str))])
    pairs = []
    for first, second, sign in study.pairs:
        figure, says = verdict(results.accuracies(best[first], SEEDS), results.accuracies(best[second], SEEDS), sign)
        open_end = {first, second} & set(ends)
        pairs.append([f"{first} minus {second}", figure, "open: a rate at an end of the grid" if open_end else says])
    return (
        text
        + markdown_table(["arm", "rate", "test accuracy, % (seeds)", "epsilon (PLD)"], rows)
        + "\n\n"
        + markdown_table(["difference", "percentage points", "the claim"], pairs)
        + f"\n\nReported runs: {seconds:.0f} s of wall clock.\n"
    )


HEAD = """# Claims of papers, tried on Fashion-MNIST

Written by `python benchmarks/claims.py`, which says how the runs were chosen; every run with its machine, seconds and commit is
a line of `claims.jsonl`. Accuracies are means ± standard errors over the seeds in brackets; delta is 1e-5. With three seeds a
difference of two equal arms exceeds two standard errors in 18 % of cases, so a single verdict is weak evidence.

Not run: TopAgg in DP-SGD; DataLens has a page of its own (generated.md); networks and lengths of the papers' own size.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="no run starts after so many")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--report", action="store_true", help="no runs")
    options = parser.parse_args()
    be_quiet()
    results, until = Results(HERE / "claims.jsonl"), time.time() + 60 * options.minutes
    for study in () if options.report else [STUDIES[name] for name in options.studies]:
        try:
            best = chosen(study, results, until)
            results.fill([run.but(seed=seed) for seed in SEEDS for run in best.values()], until=until)
        except Unfinished:
            print(f"{study.claim}: the time budget ended; call again")
    (HERE / "claims.md").write_text(HEAD + "\n".join(section(name, results) for name in STUDIES))


if __name__ == "__main__":
    main()
