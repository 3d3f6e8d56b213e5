"""DataLens and a private GAN on MNIST and Fashion-MNIST, judged by classifiers that learn from generated images.

python benchmarks/generated.py --minutes 30    # extends both .jsonl files, then writes generated.md and generated.png
python benchmarks/generated.py --report        # the page and, if their samples are cached, the picture
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gan_run, lens_run, runs
from benchmarks.gan_run import GRIDS, START, Gan
from benchmarks.generated_report import page, picture
from benchmarks.lens_run import SEEDS, Lens
from benchmarks.tasks import be_quiet

HERE = Path(__file__).parent
Kind = TypeVar("Kind", Lens, Gan)
Found = dict[str, dict[float, Kind]]  # settings by data set and epsilon


class Lines(Generic[Kind]):
    """The lines of the file by run.

    Args:
        path: of the JSON-lines file.
        kind: ``Lens`` or ``Gan``.
        execute: function that trains and judges one run.
    """

    def __init__(self, path: Path, kind: type[Kind], execute: Callable[[Kind], dict[str, Any]]) -> None:
        self.path, self.execute = path, execute
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.lines: dict[Kind, dict[str, Any]] = {kind(**line["run"]): line for line in lines}

    def fill(self, wanted: Iterable[Kind], until: float) -> bool:
        """Run what is missing and start none after ``until``; True when nothing is missing."""
        for run in wanted:
            if run in self.lines:
                continue
            if time.time() > until:
                return False
            line = {
                "run": asdict(run),
                **self.execute(run),
                "machine": runs.machine(),
                "commit": runs.commit(),
                "day": time.strftime("%Y-%m-%d"),
            }
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.lines[run] = line
            print(time.strftime("%H:%M:%S"), line["linear"], line["cnn"], line["seconds"], run, flush=True)
        return True

    def better(self, wanted: Iterable[Kind]) -> Kind:
        """Return the run whose logistic regression is best; the first of equals."""
        return max(wanted, key=lambda run: self.lines[run]["linear"])


def candidates(epsilon: float) -> list[Lens]:
    """Return the settings that the search tries on MNIST."""
    splits, teachers = {1.0: (1, 4000), 10.0: (3, 1500)}[epsilon]
    return [Lens("mnist", epsilon, splits, teachers, 100, 2.5, 1.0, 0.3, weighted) for weighted in (False, True)]


def chosen(lines: Lines[Lens], until: float) -> dict[float, Lens] | None:
    """Return the best setting by epsilon on MNIST; None if the time budget ended first."""
    found: dict[float, Lens] = {}
    for epsilon in (1.0, 10.0):
        tried = candidates(epsilon)
        if not lines.fill(tried, until):
            return None
        found[epsilon] = lines.better(tried)
    return found


def searched(lines: Lines[Gan], until: float) -> dict[float, Gan] | None:
    """Return the best setting of the GAN by epsilon on MNIST, one number after the other; None as for ``chosen``."""
    found: dict[float, Gan] = {}
    for epsilon in (1.0, 10.0):
        best = replace(START, epsilon=epsilon)
        for name, values in GRIDS.items():
            others = [replace(best, **{name: value}) for value in values if value != getattr(best, name)]
            if not lines.fill([best, *others], until):
                return None
            best = lines.better([best, *others])
        found[epsilon] = best
    return found


def on_clothes(run: Kind) -> Kind:
    """Return the setting found on MNIST for Fashion-MNIST; images of DataLens move half as far there."""
    moves = {"moves": run.moves / 2} if isinstance(run, Lens) else {}
    return replace(run, data="fashion_mnist", **moves)


def moved(found: Found[Gan], lenses: Found[Lens]) -> Found[Gan]:
    """Return the settings of the GAN with the moves and the noise of DataLens' images."""
    return {
        name: {
            epsilon: replace(run, moves=lenses[name][epsilon].moves, noise=lenses[name][epsilon].noise)
            for epsilon, run in by_epsilon.items()
        }
        for name, by_epsilon in found.items()
    }


def both(found: dict[float, Kind] | None) -> Found[Kind]:
    """Return the settings by data set and epsilon; empty before the search has ended."""
    if found is None:
        return {}
    return {"mnist": found, "fashion_mnist": {epsilon: on_clothes(run) for epsilon, run in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="no run starts after so many")
    parser.add_argument("--report", action="store_true", help="no runs")
    options = parser.parse_args()
    be_quiet()
    warnings.filterwarnings("ignore")
    until = 0.0 if options.report else time.time() + 60 * options.minutes
    lenses = Lines(HERE / "generated.jsonl", Lens, lens_run.execute)
    gans = Lines(HERE / "gan.jsonl", Gan, gan_run.execute)
    lens, gan = both(chosen(lenses, until)), both(searched(gans, until))
    methods = (lenses, lens), (gans, gan), (gans, moved(gan, lens) if lens else {})
    for seed in SEEDS:
        for lines, found in methods:
            best = (
                replace(run, report=True, seed=seed) for by_epsilon in found.values() for run in by_epsilon.values()
            )
            lines.fill(best, until)
    (HERE / "generated.md").write_text(page(*((lines.lines, found) for lines, found in methods)))
    picture([found for _, found in methods], HERE / "generated.png")


if __name__ == "__main__":
    main()
