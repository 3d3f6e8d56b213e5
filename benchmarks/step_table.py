"""The table of the step-cost benchmark, from its results."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import CASES, Case
from benchmarks.step_floor import cost_of, counts_section

OPACUS = ("hooks", "functorch", "ew", "ghost")
SPEEDUP_GOAL = 1.5
"""How many times faster than the best Opacus mode a step should be."""
SPARSE_GOAL = 1.15
"""How much slower than the dense step a step at sparsification rate 0.9 may be."""


def step_page(results: dict[str, Any]) -> str:
    """Return the figures of each machine, and the counts that hold on any machine."""
    names = [name for name in CASES if any(name in machine["cases"] for machine in results["machines"])]
    return "\n\n".join(
        [
            "Medians of pairs, each side in a process of its own, against the same step without privacy; a goal in "
            "brackets, with a cross where it is missed and a question mark where a mode of Opacus that might be "
            "faster was not measured. Sparse to dense is measured in pairs of the two. Each machine's figures are of "
            "the code of the days they name. Since 2026-11-28 each side is the median of its steps, so that the check "
            "of samples at step 10 is no part of it; before, it was the mean of a few dozen steps.",
            *(machine_section(machine) for machine in results["machines"]),
            "### Counts\n\n" + counts_section(names),
        ]
    )


def machine_section(machine: dict[str, Any]) -> str:
    """Return time, memory and peers of every case measured on one machine, with goals."""
    named = machine["environment"]
    lines = [
        f"### {named['processor'] if named['device'] == 'cpu' else named['device']}",
        "",
        f"Measured on {named['device']} ({named['processor']}), {' and '.join(machine['days'])}: "
        + ", ".join(f"{name} {named[name]}" for name in ("python", "torch", "lightning", "opacus"))
        + f". Noise on the CPU is drawn by {named['noise']}. "
        + _clocks(machine),
        "",
        "| case | plain, ms | draws, ms | plain and draws | least | time | time, lean | memory | memory, lean | "
        "sparse to dense | best Opacus to ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    measured = {name: machine["cases"][name] for name in CASES if name in machine["cases"]}
    lines += [_row(CASES[name], held, machine.get("rates")) for name, held in measured.items()]
    lines += [
        "",
        "All modes, time (and memory); kept is the step without privacy that keeps freed memory and gathers the rows "
        "of its batches, as a private fit does; untuned is the private step with `tune_process=False`; a dash means "
        "not measured:",
        "",
        *_modes(measured),
    ]
    lines += ["", *_bounds(measured)]
    first = [(name, held["memory"]["ours"]) for name, held in measured.items() if "ours" in held["memory"]]
    lines += [""] + [
        "Memory is the peak of the steps after the first. Once per run, before the first step, the independence check "
        "holds the gradients of three samples. Its peak in MB (in brackets: a step without privacy): "
        + ", ".join(f"{name} {one['first_bytes'] / 1e6:.0f} ({one['plain_bytes'] / 1e6:.0f})" for name, one in first)
        + "."
    ] * bool(first)
    failed = [(name, mode, why) for name, held in measured.items() for mode, why in held["failed"].items()]
    lines += [f"- {name}, {mode}: does not run ({why})" for name, mode, why in failed]
    return "\n".join(lines)


def time_of(held: dict[str, Any], mode: str) -> float | None:
    """Return the median ratio to the step without privacy."""
    figures = held["time"].get(mode)
    return None if figures is None else float(figures["median"])


def memory_of(held: dict[str, Any], mode: str) -> float | None:
    """Return peak memory over that of the step without privacy."""
    figures = held["memory"].get(mode)
    return None if figures is None else float(figures["ratio"])


def best_peer(held: dict[str, Any]) -> tuple[str, float] | None:
    """Return the fastest mode of Opacus, and its ratio."""
    ratios = [(time_of(held, mode), mode) for mode in OPACUS]
    known = [(ratio, mode) for ratio, mode in ratios if ratio is not None]
    return None if not known else (min(known)[1], min(known)[0])


def _speedup(held: dict[str, Any]) -> str:
    """Return the speed-up over the fastest mode of Opacus; a goal is reached only if every mode was measured
    or fails.
    """
    ours, peer = time_of(held, "ours"), best_peer(held)
    if ours is None or peer is None:
        return "-"
    all_tried = held["time"].keys() | held["failed"].keys() >= set(OPACUS)
    return f"{_judged(peer[1] / ours, SPEEDUP_GOAL, at_least=True, met_mark='✓' if all_tried else '?')} ({peer[0]})"


def _row(case: Case, held: dict[str, Any], rates: dict[str, float] | None) -> str:
    lean_time, lean_memory = case.lean_goals or (None, None)
    ours, sparse = time_of(held, "ours"), held.get("to_dense", {}).get("sparse")
    plain = held["time"]["ours"]["plain_ms"] if ours is not None else 0.0
    cells = [
        case.name,
        f"{plain:.1f}" if plain else "-",
        *_floor(case, held, plain, rates),
        _judged(ours, case.time_goal),
        _judged(time_of(held, "lean"), lean_time),
        _judged(memory_of(held, "ours"), case.memory_goal),
        _judged(memory_of(held, "lean"), lean_memory),
        _judged(sparse["median"] if sparse else None, SPARSE_GOAL),
        _speedup(held),
    ]
    return "| " + " | ".join(cells) + " |"


def _floor(case: Case, held: dict[str, Any], plain_ms: float, rates: dict[str, float] | None) -> list[str]:
    """Return the time of draws, a plain step with draws, and the least private step at these rates."""
    draws = held.get("noise", {}).get("ms")
    if draws is None or not plain_ms:
        return ["-"] * 3
    at_best = held["noise"].get("least_ms")
    least = f"{cost_of(case).least_ms(plain_ms, at_best, rates) / plain_ms:.2f}" if rates and at_best else "-"
    return [f"{draws:.1f}", f"{1 + draws / plain_ms:.2f}", least]


def _judged(value: float | None, goal: float | None, *, at_least: bool = False, met_mark: str = "✓") -> str:
    if value is None:
        return "-"
    if goal is None:
        return f"{value:.2f}"
    reached = value >= goal if at_least else value <= goal
    return f"{value:.2f} {met_mark if reached else '✗'} [{'≥' if at_least else '≤'} {goal:g}]"


def _clocks(machine: dict[str, Any]) -> str:
    """Return how time was taken, one sentence per clock."""
    figures = [figures for held in machine["cases"].values() for figures in held["time"].values()]
    ways = sorted({(one["clock"], one["threads"], min(o["pairs"] for o in figures)) for one in figures})
    texts = {
        "wall": "elapsed time",
        "processor": "processor time of the process, the machine being shared with other work",
    }
    return (
        "; ".join(
            f"Time is {texts[clock]}, {threads} thread(s), {pairs} pairs or more" for clock, threads, pairs in ways
        )
        + "."
    )


def _bounds(measured: dict[str, Any]) -> list[str]:
    """Return the limits of the figures above: a plain step with the same allocator, and peers with little to gain."""
    pairs = [(name, time_of(held, "ours"), time_of(held, "kept")) for name, held in measured.items()]
    same = [f"{name} {ours / kept:.2f}" for name, ours, kept in pairs if ours and kept]
    peers = [(name, best_peer(held)) for name, held in measured.items()]
    near = [f"{name} ({peer[0]} {peer[1]:.2f})" for name, peer in peers if peer and peer[1] < SPEEDUP_GOAL]
    lines = [
        "Time against a step without privacy that keeps freed memory and gathers its batches as well: "
        f"{', '.join(same)}."
    ] * bool(same)
    return lines + [
        f"Where Opacus itself takes less than {SPEEDUP_GOAL:g} times a step without privacy, one that cost nothing "
        f"more than that would not be {SPEEDUP_GOAL:g} times faster: {', '.join(near)}."
    ] * bool(near)


def _modes(measured: dict[str, Any]) -> list[str]:
    modes = ("kept", "ours", "untuned", "sparse", "lean", "materialize", *OPACUS)
    lines = ["| case | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for name, held in measured.items():
        cells = []
        for mode in modes:
            time, memory = time_of(held, mode), memory_of(held, mode)
            cells.append("-" if time is None else f"{time:.2f}" + ("" if memory is None else f" ({memory:.2f})"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
