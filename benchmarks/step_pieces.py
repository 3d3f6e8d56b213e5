"""The gain of each piece of the tuning of the process, alone.

    python benchmarks/step_pieces.py                     # all pieces on three cases: about 7 minutes on 2 cores
    python benchmarks/step_pieces.py --cases cnn --pieces allocator --pairs 15

A private step with all pieces against the same step without one of them. Both sides run in turn, each in a process of
its own, with wall clock; a figure is the median of the pairs' ratios, "without" over "with", so above 1.05 the piece
gains more than 5 %. Batches have a fixed size, and samples are not checked, so that both sides do the same work. A
piece that changes nothing here is said to be idle: the generator's state where mkl-random is installed, threads of
noise and their ending with one thread.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.cases import CASES, Case
from benchmarks.step_cost import time_mode
from benchmarks.step_machine import environment
from benchmarks.step_processes import OwnProcesses, serve
from benchmarks.step_runs import Clock, same_size_batches, trainer_steps
from lightning_dp import DPStrategy
from lightning_dp.noise import sources as noise_sources
from lightning_dp.system import openmp

HERE = Path(__file__).parent
WHOLE = "whole"
#: piece -> module, name in it, and what takes its place where the piece is off
PIECES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "allocator": ("lightning_dp.system.allocator", "keep_freed_memory", lambda: False),
    "openmp": ("lightning_dp.noise.cpu", "end_waiting_threads", lambda: False),
    "threads": ("lightning_dp.noise.cpu", "_threads_for", lambda num: 1),
    "generator": ("lightning_dp.noise.sources", "_has_known_layout", lambda: False),
}


def idle_pieces() -> set[str]:
    """Pieces that change nothing in this process."""
    idle: set[str] = set()
    if noise_sources._mkl_generator() is not None:
        idle.add("generator")
    if torch.get_num_threads() == 1 or not openmp.can_end_waiting_threads():
        idle.add("openmp")
    return idle | ({"threads"} if torch.get_num_threads() == 1 else set())


def switch_off(piece: str) -> None:
    """Switch a piece off, for this process."""
    module, name, instead = PIECES[piece]
    owner = importlib.import_module(module)
    if not hasattr(owner, name):
        raise AttributeError(f"Expected {module}.{name}, got a module without it. Name the piece's new place here.")
    setattr(owner, name, instead)


def run(case: Case, mode: str, steps: int, warmup: int) -> list[float]:
    """Return when each step began, with all pieces or without the one that the mode names."""
    if mode != WHOLE:
        switch_off(mode)
    clock = Clock()
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-6, check_per_sample=False)
    trainer_steps(case, strategy, [clock], warmup + steps + 1)
    return clock.began


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["mlp", "cnn", "embedding"], choices=list(CASES))
    parser.add_argument("--pieces", nargs="+", default=list(PIECES), choices=list(PIECES))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of stepping on each side of a pair, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "step_pieces.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric", "lightning_dp"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    if options.serve:
        same_size_batches()
        serve(run)
        return
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), "--serve", "--threads", str(options.threads)]
    found: dict[str, Any] = {"environment": environment(), "day": str(date.today()), "threads": options.threads}
    idle = idle_pieces()
    for name in options.cases:
        found[name] = {}
        with OwnProcesses(command, Clock) as runner:
            for piece in options.pieces:
                if piece not in idle:
                    timed = time_mode(CASES[name], piece, options.pairs, options.seconds, runner=runner, base=WHOLE)
                found[name][piece] = "idle" if piece in idle else timed.get("time", timed.get("failed", {}))[piece]
                print(f"{name:10} {piece:10} {json.dumps(found[name][piece])}", flush=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
