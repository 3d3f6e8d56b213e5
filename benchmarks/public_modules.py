"""Public packages trained plain and privately, unchanged: works or not, way taken, step to plain, agreement, message.

    python -m benchmarks.public_modules nbeats tft    # in an environment that holds the package of these cases
    python -m benchmarks.public_modules nbeats --steps    # measures the steps of a case again, and nothing else
    python -m benchmarks.public_modules --table       # writes public_modules.md and a part of docs/modules.md

Each case is toy-sized and trains as its package's own documentation does. The package is a guest: nothing of it is
changed. In a plain and a private fit, blocks of steps alternate in pairs (in_turn.py; ``--pairs``, 15 unless given).
The ratio is the median over the pairs of the median steps, private to plain, from the start of a batch to its end
without loader and metrics, in processor time on one thread. The agreement is the largest difference between per-sample
gradients in a batch and those of samples run alone, relative to the largest gradient; a further private fit measures it
in float64.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import pkgutil
import re
import statistics
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import in_turn, public_cases
from benchmarks.public_cases.registry import CASES

RESULTS = Path(__file__).resolve().with_name("public_modules.json")
TABLE = Path(__file__).with_name("public_modules.md")
PAGE = Path(__file__).parents[1] / "docs" / "modules.md"
WAYS = {"PerSampleEngine": "rules", "SingleSampleEngine": "single"}

for found_module in pkgutil.iter_modules(public_cases.__path__):
    importlib.import_module(f"benchmarks.public_cases.{found_module.name}")


def clock(package: str) -> tuple[Any, list[float], list[Any]]:
    """Return a callback of one of Lightning's packages, times of batches, and a strategy's way and steps."""
    times: list[float] = []
    ways: list[Any] = []

    class Clock(importlib.import_module(package).Callback):  # type: ignore[misc]
        # hooks of the user's own callbacks are watched, which costs time that no user without such hooks spends
        __module__ = "lightning_dp.benchmark"

        def on_train_batch_start(self, *args: Any) -> None:
            self.began = time.process_time()

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            times.append(time.process_time() - self.began)
            fit_now = getattr(trainer.strategy, "_fit", None)
            if fit_now is not None:
                ways[:] = [type(fit_now.step.engine).__name__, trainer.strategy.ledger.num_steps]

    return Clock(), times, ways


@contextmanager
def differences() -> Iterator[list[float]]:
    """Keep the difference of each comparison of a batch with its samples run alone that the library makes."""
    from lightning_dp.per_sample import independence
    from lightning_dp.trials import couplings

    original, found = couplings.compare_with_singles, []

    def measured(batched: Any, singles: Any, **options: Any) -> None:
        singles = list(singles)
        sums = independence.sums_of(batched, singles, options.get("scale", 1.0))[1]
        both = sum(sums.values(), torch.zeros(4, 1, dtype=torch.float64))
        largest = max(float(both[:2].max()) ** 0.5, 1e-300)
        found.append(max((float(each[3].max()) ** 0.5 for each in sums.values()), default=math.nan) / largest)
        original(batched, singles, **options)

    couplings.compare_with_singles = measured
    try:
        yield found
    finally:
        couplings.compare_with_singles = original


@contextmanager
def working_in(folder: str) -> Iterator[None]:
    """Make a folder the current one: some packages write files there."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def fit(case: Any, *, private: bool, **trainer: Any) -> tuple[list[Any], list[float]]:
    """Train a case once; return the way and number of steps, and the differences."""
    callback, _, ways = clock(case.tree)
    with tempfile.TemporaryDirectory() as folder, working_in(folder), differences() as differ:
        arguments = {
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
            "strategy": "auto", "callbacks": [callback], **trainer,
        }  # fmt: skip
        if private:
            from lightning_dp import DPStrategy, EpsilonMonitor

            arguments["strategy"] = DPStrategy(noise_multiplier=1.0, **case.options)
            arguments["callbacks"].append(EpsilonMonitor(every_n_steps=1))
        torch.manual_seed(0)
        case.train(arguments)
    return ways, differ


def run(name: str, pairs: int) -> dict[str, Any]:
    """Train a case plain, privately, privately in float64, and with steps in turn; return what was seen."""
    case = CASES[name]
    found: dict[str, Any] = {"case": name, "package": case.package, "what": case.title, "options": case.options}
    private = False
    try:
        fit(case, private=private)
        private = True
        ways, differ = fit(case, private=private)
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        found["message"] = f"{type(error).__name__}: {error} {notes}"[:1000]
        found["failed"] = "private" if private else "plain"
        found["trace"] = traceback.format_exc()[-3000:]
        return found
    found["way"] = WAYS.get(ways[0], ways[0]) if ways else ""
    found["steps"] = ways[1] if ways else 0
    found |= steps(name, pairs)
    if differ:
        found["differs"] = float(f"{max(differ):.1e}")
        found |= in_float64(case)
    return found


def steps(name: str, pairs: int) -> dict[str, Any]:
    """Return the ratio of a private step to a plain one, its quartiles, and the pairs of blocks of steps.

    It is empty if the fits are too short.
    """
    ratios, block = in_turn.ratios_of(name, pairs)
    if len(ratios) < 2:
        return {}
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(middle, 1),
        "quartiles": [round(low, 1), round(high, 1)],
        "pairs": len(ratios),
        "block": block,
    }


def in_float64(case: Any) -> dict[str, Any]:
    """Return the largest difference in float64, or why the package does not train in it."""
    torch.set_default_dtype(torch.float64)  # the data that a case draws
    try:
        _, differ = fit(case, private=True, precision="64-true")
        return {"differs64": float(f"{max(differ):.1e}")}
    except Exception as error:
        return {"not64": f"{type(error).__name__}: {error}"[:200]}
    finally:
        torch.set_default_dtype(torch.float32)


def verdict(found: dict[str, Any]) -> str:
    """Return whether a case trains, is refused as it must be, or fails."""
    refused = CASES[found["case"]].refused
    if "failed" not in found:
        return "yes" if refused is None else "yes, **but must not**"
    if refused and found["failed"] == "private" and re.search(refused, found["message"]):
        return "refused, coupled by nature"
    return f"**no** ({found['failed']})"


def write(found: dict[str, Any]) -> None:
    """Put a result among the others."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[found["case"]] = found
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def rows() -> list[dict[str, str]]:
    """Return what the tables say of each case that was run, by package."""
    results = json.loads(RESULTS.read_text())
    said = []
    for name, case in sorted(CASES.items(), key=lambda item: item[1].package.lower()):
        if name not in results:
            continue
        found = results[name]
        message = re.split(r"(?<=[.!])\s", found.get("message", "").replace("|", "/").replace("\n", " "))[0]
        said.append(
            {
                "package": case.package,
                "model": case.title,
                "arguments": ", ".join(f"`{key}={value!r}`" for key, value in case.options.items()),
                "trains": verdict(found),
                "way": found.get("way", ""),
                "step to plain": str(found.get("ratio", "")),
                "pairs": str(found.get("pairs", "")),
                "steps of a block": str(found.get("block", "")),
                "agreement": f"{found['differs']:.0e}" if "differs" in found else "",
                "in float64": f"{found['differs64']:.0e}" if "differs64" in found else "",
                "message, first sentence": message[:240],
            }
        )
    return said


def as_table(columns: list[str], entries: list[dict[str, str]]) -> list[str]:
    """Return some columns of the entries as lines of Markdown."""
    lines = [columns, ["---"] * len(columns), *([entry[column] for column in columns] for entry in entries)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def write_tables() -> None:
    """Write the page of results, and the part of the documentation that lists the models."""
    entries = rows()
    trained = sum(entry["trains"] == "yes" for entry in entries)
    refused = sum(entry["trains"].startswith("refused") for entry in entries)
    summary = (
        f"{len(entries)} models of {len({entry['package'] for entry in entries})} packages: {trained} train, "
        f"{refused} are coupled by nature and refused, {len(entries) - trained - refused} fail."
    )
    about = (
        "Made by `python -m benchmarks.public_modules`. Ratios are medians over pairs of blocks of steps, plain and "
        "private in turn on one core, of the median steps without the loader, in processor time of one thread on a "
        "shared machine, at toy size. Where no block is given, whole fits took turns, and ratios are lower. "
        '"Agreement" is the largest difference between per-sample gradients in a batch and those of samples run alone, '
        "relative to the largest gradient, in float32 and, where it was measured and the package trains in it, in "
        "float64. EfficientNet leaves one pixel to its last groups. Llama, T5, Mamba and x-transformers compute norms "
        'or a softmax in float32 by themselves. Way "single" needs no such comparison.'
    )
    page = [
        "# Public packages, unchanged",
        "",
        *textwrap.wrap(about, 120),
        "",
        summary,
        "",
        *as_table(list(entries[0]), entries),
    ]
    TABLE.write_text("\n".join(page) + "\n")
    begin, end = "<!-- public packages -->\n", "<!-- end of public packages -->"
    before, rest = PAGE.read_text().split(begin)
    part = [summary, "", *as_table(["package", "model", "arguments", "trains", "way"], entries)]
    PAGE.write_text(before + begin + "\n" + "\n".join(part) + "\n\n" + end + rest.split(end)[1])


def main() -> None:
    """Run the cases that are named, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--pairs", type=int, default=15, help="blocks of steps of each kind, plain and private in turn")
    parser.add_argument("--steps", action="store_true", help="measure the steps alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in options.cases:
        if options.steps:
            old = ("ratio", "spread", "quartiles", "pairs", "block")
            found = {key: value for key, value in json.loads(RESULTS.read_text())[name].items() if key not in old}
            found |= steps(name, options.pairs)
            print(name, *(found.get(each) for each in ("ratio", "quartiles", "pairs", "block")), flush=True)
            write(found)
            continue
        found = run(name, options.pairs)
        trace = found.pop("trace", "")
        print(json.dumps(found), trace, sep="\n", flush=True)
        write(found)
    if options.table:
        write_tables()


if __name__ == "__main__":
    main()
