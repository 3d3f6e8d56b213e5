"""The studies of ``units_and_noise.py``: networks, data and arms, and the search of an arm's recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.recipes import Unfinished
from benchmarks.runs import Results, Run

SEARCH_SEED, SEEDS, MORE_SEEDS = 100, tuple(range(5)), tuple(range(5, 15))
LAST, AVERAGE, OWN = "last", "average", "average, own rate"
GROWTHS = 4


@dataclass(frozen=True)
class Study:
    """One network on one data set.

    Args:
        title: of its section.
        start: run that the search begins with.
        arms: name -> what an arm changes.
        epsilons: in the order in which they run; the first has the long search.
    """

    title: str
    start: Run
    arms: dict[str, dict[str, Any]]
    epsilons: tuple[float, ...] = (3.0, 1.0, 8.0)


@dataclass(frozen=True)
class Recipe:
    """An arm's best run on the validation records.

    Args:
        run: with the seed of the search.
        decay: of the average; empty for the last weights.
        ends: the numbers whose best value is at an end of what was tried.
    """

    run: Run
    decay: str
    ends: tuple[str, ...]


FLAT, EQUAL, LEAST = "Poisson, flat", "Poisson, per layer, equal noise", "Poisson, per layer, least noise"
LAYERS: dict[str, dict[str, Any]] = {FLAT: {}, EQUAL: {"clipping": "equal"}, LEAST: {"clipping": "least"}}
INDEPENDENT, CORRELATED = "cyclic, independent noise, flat", "cyclic, correlated noise, flat"
ORDERS: dict[str, dict[str, Any]] = {
    "shuffle (random allocation), flat": {"sampling": "shuffle"},
    INDEPENDENT: {"sampling": "cyclic"},
    CORRELATED: {"sampling": "cyclic", "correlated": True},
}
START = Run("fashion_mnist", "deep mlp", 8, 1024, 8.0, epsilon=3.0, clip=0.3, average=True)
STUDIES = {
    "fashion_mnist": Study(
        "Fashion-MNIST: perceptron 784-64-64-10 with tanh, 55,050 weights in three layers, batch 1,024, 8 passes",
        START,
        LAYERS | ORDERS,
    ),
    "letter": Study(
        "letter: perceptron 16-64-64-26 with tanh, 6,938 weights in three layers, batch 512, 20 passes",
        START.but(data="letter", network="letter mlp", batch=512, epochs=20),
        LAYERS,
    ),
    "letter norms": Study(
        "letter: the same perceptron with layer normalisation, 7,194 weights in five layers of 128 to 4,160",
        START.but(data="letter", network="letter norms", batch=512, epochs=20),
        LAYERS,
        (3.0,),
    ),
    "adult": Study(
        "Adult: perceptron 48-64-2 with tanh, two layers, batch 1,024, 10 passes",
        START.but(data="adult", network="adult mlp", epochs=10, lr=2.0),
        LAYERS,
    ),
    "cnn": Study(
        "Fashion-MNIST: convolutional network of 26,010 weights in four layers with tanh, batch 1,024, 4 passes",
        START.but(network="tanh cnn", epochs=4),
        LAYERS,
        (3.0,),
    ),
}


def score(line: dict[str, Any], weights: str, decay: str = "") -> float:
    """Return the accuracy of the last weights, or of the average with a decay: the best average if none is given."""
    if not decay and weights == LAST:
        return float(line["accuracy"])
    averages = line["averages"]
    return float(averages[decay] if decay else max(averages.values()))


def climb(
    start: Run, change: Callable[[Run, float], Run], grid: Sequence[float], weights: str, results: Results, until: float
) -> tuple[Run, bool]:
    """Return the best run over a grid that grows at its ends, and whether the best value is still at an end.

    Args:
        start: the run to change.
        change: run and factor -> run.
        grid: factors at equal ratios, rising.
        weights: ``LAST`` or ``OWN``, what is to be best.
        results: finished runs.
        until: no run starts after this time.

    Raises:
        Unfinished: the time budget ended first.
    """
    factors, ratio = list(grid), grid[1] / grid[0]
    for growth in range(GROWTHS + 1):
        runs = {factor: change(start, factor) for factor in factors}
        if not results.fill(runs.values(), until=until):
            raise Unfinished
        best = max(factors, key=lambda factor: score(results.lines[runs[factor]], weights))
        if best not in (factors[0], factors[-1]):
            return runs[best], False
        if growth < GROWTHS:
            factors = [best / ratio, *factors] if best == factors[0] else [*factors, best * ratio]
    return runs[best], True


def faster(run: Run, factor: float) -> Run:
    """Return the run with a multiple of its rate."""
    return run.but(lr=float(f"{run.lr * factor:.6g}"))


def wider(run: Run, factor: float) -> Run:
    """Return the run with a multiple of its bound and the same rate times bound."""
    return run.but(clip=float(f"{run.clip * factor:.6g}"), lr=float(f"{run.lr / factor:.6g}"))


def recipe(study: Study, arm: str, epsilon: float, weights: str, results: Results, until: float) -> Recipe:
    """Search an arm's recipe at one epsilon.

    Raises:
        Unfinished: the time budget ended first.
    """
    run = study.start.but(seed=SEARCH_SEED, **study.arms[arm])
    ends = []
    run, _ = climb(run, faster, (0.5, 1.0, 2.0), LAST, results, until)
    run, end = climb(run, wider, (1 / 3, 1.0, 3.0), LAST, results, until)
    ends += ["bound"] if end else []
    target = OWN if weights == OWN else LAST
    run, end = climb(run.but(epsilon=epsilon), faster, (0.5, 1.0, 2.0), target, results, until)
    ends += ["rate"] if end else []
    averages = results.lines[run]["averages"]
    decay = "" if weights == LAST else max(averages, key=lambda name: averages[name])
    return Recipe(run, decay, tuple(ends))


def figures(found: Recipe, weights: str, results: Results) -> dict[str, float]:
    """Return the test accuracy by seed, of the seeds that the file holds."""
    lines = {seed: results.lines.get(found.run.but(report=True, seed=seed)) for seed in SEEDS + MORE_SEEDS}
    return {str(seed): score(line, weights, found.decay) for seed, line in lines.items() if line is not None}


def kinds(arm: str) -> tuple[str, ...]:
    """Return the kinds of weights of an arm that are judged."""
    return (LAST, AVERAGE, OWN) if arm == FLAT else (LAST, AVERAGE)
