"""Cost of epsilon: a query after one more step, from scratch, and calibration.

Run: python benchmarks/accounting_cost.py

Prints milliseconds; takes no argument and writes nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from lightning_dp.accounting import Ledger, PrivacyEvent, calibrate_noise_multiplier, make_accountant

DELTA = 1e-5


def milliseconds(function: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def schedule(sigma: float, num_sigmas: int = 100, steps: int = 100) -> list[tuple[PrivacyEvent, int]]:
    """Return a noise multiplier that decays by 1 % after each run."""
    return [
        (PrivacyEvent.poisson(noise_multiplier=sigma * 0.99**index, sample_rate=0.01), steps)
        for index in range(num_sigmas)
    ]


def main() -> None:
    """Measure and print one line a case."""
    histories = {
        "100,000 steps of one sigma": [(PrivacyEvent.poisson(noise_multiplier=4.0, sample_rate=0.01), 100_000)],
        "10,000 steps of 100 sigmas": schedule(3.0),
        "100,000 steps of 100 sigmas": schedule(6.0, steps=1_000),
    }
    for label, runs in histories.items():
        for name in ("rdp", "pld"):
            accountant, ledger = make_accountant(name), Ledger().extended(runs)
            first = milliseconds(lambda a=accountant, led=ledger: a.epsilon(led, DELTA))
            more = []
            for _ in range(20):
                ledger.record(runs[-1][0])
                more.append(milliseconds(lambda a=accountant, led=ledger: a.epsilon(led, DELTA)))
            print(f"{label}, {name}: from scratch {first:.1f}, one more step {statistics.median(more):.2f}")
    plans: dict[str, Callable[[float], list[tuple[PrivacyEvent, int]]]] = {
        "constant": lambda sigma: schedule(sigma, num_sigmas=1, steps=10_000),
        "100 sigmas": schedule,
    }
    for label, plan in plans.items():
        took = milliseconds(
            lambda plan=plan: calibrate_noise_multiplier(
                target_epsilon=3.0, delta=DELTA, accountant=make_accountant("pld"), runs=plan, history=Ledger()
            )
        )
        print(f"calibration, {label}, pld: {took:.0f}")


if __name__ == "__main__":
    main()
