"""The cost of a private step against the same step without privacy, and against Opacus.

    python benchmarks/step_cost.py                       # the whole table: step_cost.json, and its section of README.md
    python benchmarks/step_cost.py --cases mlp --pairs 7 --modes ours
    python benchmarks/step_cost.py --device cuda         # the same on a GPU, or an error where there is none

Both sides run in a Lightning Trainer with automatic optimization, noise and optimizer included. They alternate, each in
its own process; a figure is the median of the pairs' ratios, and each side of a pair the median of its steps, which
leaves out the check of samples at step 10. Opacus runs in a plain loop, its best case. Batches have a
fixed size on all sides, so that all do the same work. ``kept`` is the step without privacy under the process settings
of a private fit: freed memory is kept from step to step (``allocator.py``, on a CPU), and the rows of a batch are
gathered at once (``sampling/gather.py``).

Peak memory is measured in one process per case, which has loaded everything that the mode needs: the highest resident
size (on a GPU: the highest allocated memory) from the second batch to the last, less the size before the model was
made. The first batch has its own peak, ``first_bytes``, because the independence check before it holds the gradients of
a few samples. Results are merged into the JSON file, mode by mode, with those of the same environment. Figures of
another processor or version have their own table, with the days on which they were measured.

On a shared machine, ``--clock processor --threads 1`` counts the processor time of the process instead of elapsed
time: it excludes the time of other processes, and the gain of a second thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks.cases import CASES, Case
from benchmarks.readme import write_section
from benchmarks.step_machine import DEVICE, environment, machine_in, measure_noise, measure_rates, merge
from benchmarks.step_processes import DoesNotRun, OwnProcesses, serve
from benchmarks.step_runs import OURS, WARMUP, Clock, forget_peak, peak_bytes, resident, run, same_size_batches
from benchmarks.step_table import OPACUS, step_page

HERE = Path(__file__).parent
MODES = ("plain", "kept", *OURS, *OPACUS)
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


#: case, mode, steps, warm-up -> when each step began
Runner = Callable[..., Clock]


def measure_memory(case: Case, mode: str) -> tuple[int, int]:
    """Return peak bytes of a few steps and of the first batch, less the memory before."""
    same_size_batches()
    small = Case("small", 2, lambda: nn.Linear(2, 2), lambda size: torch.randn(size, 2), 2, 0.0, 0.0)
    run(small, mode, 1)  # loads every library that the mode needs
    gc.collect()
    forget_peak()
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else resident("VmRSS")
    clock = run(case, mode, 3, 1)
    return peak_bytes() - before, clock.first_peak - before


def memory_in_own_process(case: Case, mode: str) -> tuple[int, int]:
    """Measure memory in fresh processes: the median of three, because timing decides some choices."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), "--memory", case.name, mode]
    found = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, first = done.stdout.split()[-2:]
        found.append((int(peak), int(first)))
    return sorted(found)[1]


def trial(case: Case, mode: str, target_seconds: float, runner: Runner) -> tuple[int, int]:
    """Return steps and warm-up of one side of a pair, from a first run that also shows whether the mode works."""
    clock = runner(case, mode, 2, WARMUP)
    steps = round(target_seconds / clock.seconds_a_step(WARMUP))
    return max(2, min(60, steps)), WARMUP


def time_mode(
    case: Case, mode: str, pairs: int, target_seconds: float, *, runner: Runner, base: str = "plain"
) -> dict[str, Any]:
    """Time one mode against the base, pair by pair; the order alternates."""
    sizes = {base: trial(case, base, target_seconds, runner)}
    try:
        sizes[mode] = trial(case, mode, target_seconds, runner)
    except DoesNotRun as error:  # a peer that cannot run a model is a result
        return {"failed": {mode: str(error)}}
    measured = []
    for number in range(pairs):
        both = {}
        for side in (base, mode) if number % 2 == 0 else (mode, base):
            steps, warmup = sizes[side]
            both[side] = runner(case, side, steps, warmup).seconds_a_step(warmup)
        measured.append((both[base], both[mode]))
    ratios = [private / plain for plain, private in measured]
    figures = {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "pairs": pairs,
        f"{base}_ms": 1e3 * statistics.median(plain for plain, _ in measured),
    }
    return {"time": {mode: figures}}


def memory_of_mode(case: Case, mode: str, known: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Return the peak memory of a mode, in bytes and against the step without privacy."""
    if case.name not in known:
        known[case.name] = memory_in_own_process(case, "plain")
    (peak, first), (plain, _) = memory_in_own_process(case, mode), known[case.name]
    return {"memory": {mode: {"bytes": peak, "first_bytes": first, "ratio": peak / plain, "plain_bytes": plain}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--modes", nargs="+", default=list(MODES[1:]), choices=MODES[1:])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of stepping on each side of a pair, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda"), help="cuda: fail where there is no GPU")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "step_cost.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    if options.device == "cuda" and DEVICE.type != "cuda":
        parser.error("Expected a GPU for --device cuda, got none. Leave the option out to measure on the CPU.")
    if options.memory:
        print(*measure_memory(CASES[options.memory[0]], options.memory[1]))
        return
    Clock.now = staticmethod(CLOCKS[options.clock])
    if options.serve:
        same_size_batches()
        serve(lambda case, mode, steps, warmup: run(case, mode, steps, warmup).began)
        return
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"machines": []}
    machine = machine_in(results, environment(), str(date.today()))
    seen = machine.get("rates", {})
    machine["rates"] = {what: max(rate, seen.get(what, 0.0)) for what, rate in measure_rates().items()}
    plain_bytes: dict[str, tuple[int, int]] = {}
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), "--serve"]
    command += ["--threads", str(options.threads), "--clock", options.clock]
    for name in options.cases:
        case = CASES[name]
        if case.needs_gpu and DEVICE.type != "cuda":
            print(f"{name}: left out, it needs a GPU")
            continue
        for mode in options.modes:
            found: dict[str, Any] = {"noise": measure_noise(case)} if mode == "ours" else {}
            if not options.no_time:
                with OwnProcesses(command, Clock) as runner:
                    found |= time_mode(case, mode, options.pairs, options.seconds, runner=runner)
                    if mode == "sparse":  # its goal is a ratio to the dense step: pairs of the two
                        dense = time_mode(case, mode, options.pairs, options.seconds, runner=runner, base="ours")
                        found["to_dense"] = dense.get("time", {})
            for figures in (*found.get("time", {}).values(), *found.get("to_dense", {}).values()):
                figures |= {"clock": options.clock, "threads": options.threads}
            if not options.no_memory and "failed" not in found:
                found |= memory_of_mode(case, mode, plain_bytes)
            merge(machine, name, found)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            print(name, mode, json.dumps(found), flush=True)
    if options.out == HERE / "step_cost.json":
        write_section("step_cost", step_page(results))


if __name__ == "__main__":
    main()
