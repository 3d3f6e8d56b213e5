"""The cost that each method adds to a private step with flat clipping.

    python benchmarks/method_cost.py                          # all: method_cost.json, and its section of README.md
    python benchmarks/method_cost.py --methods pruning --pairs 7

Pairs of runs in turn, as in ``step_cost.py``: the transformer there, DP-SGD with flat clipping against the same with
the method. What a call measures is merged into the JSON file, method by method.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch

from benchmarks.cases import CASES, Case
from benchmarks.readme import write_section
from benchmarks.step_cost import CLOCKS, time_mode
from benchmarks.step_machine import environment
from benchmarks.step_runs import WARMUP, Clock, same_size_batches, trainer_steps
from lightning_dp import (
    AdaptiveClipping,
    AutoThreshold,
    ClippingScheduler,
    DPStrategy,
    MagnitudePruning,
    NoiseScheduler,
    RandomSparsification,
    TopAgg,
)
from lightning_dp.clipping import Clipping
from lightning_dp.masks import RandomMask

HERE = Path(__file__).parent
CASE = CASES["transformer"]
BASE = "flat"
GOAL = 1.10
"""How much slower than the step with flat clipping a step with sparsification, pruning, AUTO-S or a schedule may be."""

#: clipping, callbacks, whether GOAL is meant
METHODS: dict[str, tuple[Callable[[], str | Clipping], Callable[[], list[L.Callback]], bool]] = {
    BASE: (lambda: "flat", list, False),
    "sparsification 0.9": (
        lambda: "flat",
        lambda: [RandomSparsification(0.9, schedule="constant", refresh=10**6)],
        True,
    ),
    "pruning 0.5": (lambda: "flat", lambda: [MagnitudePruning(0.5)], True),
    "AUTO-S": (lambda: "automatic", list, True),
    "noise schedule": (lambda: "flat", lambda: [NoiseScheduler("exponential", factor=0.999, interval="step")], True),
    "clipping schedule": (
        lambda: "flat",
        lambda: [ClippingScheduler("exponential", factor=0.999, interval="step")],
        True,
    ),
    "AutoThreshold": (lambda: "flat", lambda: [AutoThreshold()], False),
    "AdaptiveClipping": (lambda: "flat", lambda: [AdaptiveClipping()], False),
    "TopAgg, k/d 0.1": (lambda: TopAgg(0.1), list, False),
    "TopAgg, k/d 0.1, values": (lambda: TopAgg(0.1, keep_values=True), list, False),
}


def run(case: Case, method: str, steps: int, warmup: int = WARMUP) -> Clock:
    """Run warm-up steps, the timed steps, and one more, whose beginning ends the last."""
    gc.collect()
    clock = Clock()
    make_clipping, make_callbacks, _ = METHODS[method]
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-6, clipping=make_clipping(), check_per_sample=False)
    trainer_steps(case, strategy, [clock, *make_callbacks()], warmup + steps + 1)
    return clock


def seconds_a_mask(case: Case, now: Callable[[], float]) -> float:
    """Return the time to draw one random mask at rate 0.9, which is paid once per refresh, not per step."""
    parameters = dict(case.make_network().named_parameters())
    mask = RandomMask(0.9, schedule="constant", refresh_steps=1, num_refreshes=9)
    began = now()
    for step in range(5):
        mask.live(step, parameters)
    return (now() - began) / 5


def section(results: dict[str, Any]) -> str:
    """Return the table as text."""
    named, mask = results["environment"], results["mask_ms"]
    lines = [
        f"Measured on {named['device']} ({named['processor']}), torch {named['torch']}. Medians of pairs, against the "
        "same private step with flat clipping; smallest and largest pair in brackets. The clock `processor` counts "
        "the processor time of the process, on a shared machine; `wall` counts elapsed time, on a machine of its own.",
        "",
        "| method | step, to flat clipping | goal | clock, threads |",
        "|---|---|---|---|",
    ]
    for method, (_, _, has_goal) in METHODS.items():
        if method in results["time"]:
            found = results["time"][method]
            goal = "" if not has_goal else f"{GOAL:.2f} {'reached' if found['median'] <= GOAL else 'missed'}"
            lines.append(
                f"| {method} | {found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f}) | {goal} "
                f"| {found['clock']}, {found['threads']} |"
            )
    flat = [found[f"{BASE}_ms"] for found in results["time"].values()]
    lines += [
        "",
        f"A step with flat clipping takes {min(flat):.0f} to {max(flat):.0f} ms. A new random mask takes {mask:.0f} "
        "ms, once per refresh (an epoch by default), in addition to the figure above. TopAgg materializes every "
        "per-sample gradient to find its k largest entries: `microbatch_size` bounds its memory.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[1:], choices=list(METHODS)[1:])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of stepping on each side of a pair, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--out", type=Path, default=HERE / "method_cost.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    Clock.now = staticmethod(CLOCKS[options.clock])
    same_size_batches()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"time": {}}
    results |= {"environment": environment(), "mask_ms": 1e3 * seconds_a_mask(CASE, CLOCKS[options.clock])}
    for method in options.methods:
        found = time_mode(CASE, method, options.pairs, options.seconds, base=BASE, runner=run)
        if "failed" in found:
            raise RuntimeError(f"Expected {method} to run, got {found['failed'][method]}. Every method must.")
        figures = found["time"][method] | {"clock": options.clock, "threads": options.threads}
        results["time"][method] = figures
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{method}: {figures['median']:.3f}", flush=True)
    if options.out == HERE / "method_cost.json":
        write_section("method_cost", section(results))


if __name__ == "__main__":
    main()
