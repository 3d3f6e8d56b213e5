"""The cost of computing epsilon: from scratch, after one more step, and while calibrating noise to a target.

    python benchmarks/accounting_cost.py            # accounting_cost.json, and its section of README.md; two minutes
    python benchmarks/accounting_cost.py --quick    # a few cases, printed only

Wall-clock times of one process on one thread. Every calibrated multiplier is checked by a new accountant: its epsilon
must not exceed the target, and must be at least 99 % of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.readme import write_section
from lightning_dp.accounting import Ledger, PrivacyEvent, calibrate_noise_multiplier, make_accountant

HERE = Path(__file__).parent
DELTA = 1e-5
LIMITS_MS = {"rdp": 5.0, "pld": 50.0}
LIMITS_S = {"constant": 5.0, "100 sigmas": 30.0}
TARGETS, RATES, STEPS = (0.1, 1.0, 3.0, 20.0), (1e-4, 0.01, 0.1, 1.0), (1, 100, 100_000)
Runs = list[tuple[PrivacyEvent, int]]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def decaying(sigma: float, sample_rate: float = 0.01, num_sigmas: int = 100, steps: int = 100) -> Runs:
    """Return a noise multiplier that falls by 1 % after each run of steps."""
    return [
        (PrivacyEvent.poisson(noise_multiplier=sigma * 0.99**index, sample_rate=sample_rate), steps)
        for index in range(num_sigmas)
    ]


def query(name: str, history: Runs, later: Callable[[int], PrivacyEvent], repeats: int) -> dict[str, float]:
    """Return milliseconds of one epsilon from scratch, and after each of some further steps."""
    accountant, ledger = make_accountant(name), Ledger().extended(history)
    first, _ = timed(lambda: accountant.epsilon(ledger, DELTA))
    more = []
    for number in range(repeats):
        ledger.record(later(number))
        more.append(1e3 * timed(lambda: accountant.epsilon(ledger, DELTA))[0])
    return {"from_scratch": 1e3 * first, "median": statistics.median(more), "slowest": max(more)}


def queries(repeats: int) -> list[dict[str, Any]]:
    """Time epsilon for several histories, each with its next step."""
    schedule, constant = decaying(3.0), decaying(4.0, num_sigmas=1, steps=100_000)
    long = decaying(6.0, steps=1_000)
    cases: list[tuple[str, Runs, Callable[[int], PrivacyEvent]]] = [
        ("100,000 steps of one sigma, one more of it", constant, lambda number: constant[-1][0]),
        ("10,000 steps of 100 sigmas, one more of the last", schedule, lambda number: schedule[-1][0]),
        ("100,000 steps of 100 sigmas, one more of the last", long, lambda number: long[-1][0]),
        (
            "10,000 steps of 100 sigmas, then a new sigma each step",
            schedule,
            lambda number: PrivacyEvent.poisson(noise_multiplier=3.0 * 0.99 ** (100 + number), sample_rate=0.01),
        ),
    ]
    return [
        {"history": label, "accountant": name, **query(name, history, later, repeats)}
        for label, history, later in cases
        for name in LIMITS_MS
    ]


def calibration(target: float, runs: Callable[[float], Runs]) -> dict[str, float]:
    """Return the seconds of one calibration under pld, and the share of the target that its result spends."""
    seconds, sigma = timed(
        lambda: calibrate_noise_multiplier(
            target_epsilon=target, delta=DELTA, accountant=make_accountant("pld"), runs=runs, history=Ledger()
        )
    )
    spent = make_accountant("pld").epsilon(Ledger().extended(runs(sigma)), DELTA)
    return {"seconds": seconds, "noise_multiplier": sigma, "share": spent / target}


def calibrations(cases: Sequence[tuple[float, float, int]]) -> dict[str, list[dict[str, Any]]]:
    """Time calibrations: constant sigma over targets, sample rates and lengths; a schedule of 100 sigmas over
    targets.
    """
    constant = []
    for target, rate, steps in cases:
        found = calibration(target, lambda sigma, q=rate, n=steps: decaying(sigma, q, 1, n))  # type: ignore[misc]
        constant.append({"target": target, "sample_rate": rate, "steps": steps, **found})
    schedule = [{"target": target, **calibration(target, decaying)} for target in sorted({case[0] for case in cases})]
    return {"constant": constant, "100 sigmas": schedule}


def section(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{results['processor']}, Python {results['python']}, delta {DELTA:g}. Milliseconds of one query:",
        "",
        "| history | accountant | from scratch | a further step, median | slowest | limit |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in results["queries"]:
        lines.append(
            f"| {row['history']} | {row['accountant']} | {row['from_scratch']:.1f} | {row['median']:.2f} | "
            f"{row['slowest']:.2f} | {LIMITS_MS[row['accountant']]:.0f} |"
        )
    lines += [
        "",
        "Calibration under pld; the share is that of the target which the result spends, by a new accountant:",
        "",
        "| plan | cases | median s | slowest s | limit s | least share | largest share |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for plan, rows in results["calibrations"].items():
        seconds, shares = [row["seconds"] for row in rows], [row["share"] for row in rows]
        lines.append(
            f"| {plan} | {len(rows)} | {statistics.median(seconds):.2f} | {max(seconds):.2f} | {LIMITS_S[plan]:.0f} "
            f"| {min(shares):.5f} | {max(shares):.5f} |"
        )
    worst = max(results["calibrations"]["constant"], key=lambda row: row["seconds"])
    lines += [
        "",
        f"Constant: targets {', '.join(map(str, results['targets']))}; sample rates "
        f"{', '.join(map(str, results['rates']))}; {', '.join(map(str, results['steps']))} steps; the slowest is "
        f"epsilon {worst['target']:g} at q {worst['sample_rate']:g} over {worst['steps']} steps. A schedule: 100 "
        "sigmas of 100 steps, each 1 % below the one before, at q 0.01.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    targets, rates, steps = ((1.0,), (0.01,), (100,)) if options.quick else (TARGETS, RATES, STEPS)
    results: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "targets": targets,
        "rates": rates,
        "steps": steps,
        "queries": queries(5 if options.quick else 30),
        "calibrations": calibrations(list(itertools.product(targets, rates, steps))),
    }
    print(section(results))
    for rows in results["calibrations"].values():
        for row in rows:
            # below a multiplier of 1e-3 nothing is searched: such a plan may stay far below its target
            least = 0.99 if row["noise_multiplier"] > 1e-3 else 0.0
            assert least <= row["share"] <= 1, row
    if not options.quick:
        (HERE / "accounting_cost.json").write_text(json.dumps(results, indent=1) + "\n")
        write_section("accounting_cost", section(results))


if __name__ == "__main__":
    main()
