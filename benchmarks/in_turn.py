"""A plain and a private fit of a public case, whose steps alternate: each waits for the other after a block of steps.

A machine that others share changes its speed within minutes. Whole fits in turn are so far apart that a ratio of their
steps shows this, too; blocks of steps are not. Both processes run on the same core, and one computes at a time.

    python -m benchmarks.in_turn gcn plain    # one side: takes as many steps as each line of its input says
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

BLOCK_SECONDS, LEAST, MOST = 0.2, 3, 16
"""Length of a block of plain steps, and how many there are at least and at most."""
WARM_STEPS, WARM_SECONDS = 48, 30.0
"""Steps that both sides take before any counts, or fewer if they take longer."""
_MARK = "steps: "  # packages print as well


class FitEnded(Exception):
    """An error for a fit that has no further steps."""


class Side:
    """A fit in a process of its own, on the last core that is there.

    Args:
        command: what starts it; it must call :func:`serve`.
    """

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self._wait()

    def steps(self, num: int) -> list[float]:
        """Take steps; return the seconds of each."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{num}\n")
        self._process.stdin.flush()
        return self._wait()

    def _wait(self) -> list[float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return [float(each) for each in line.removeprefix(_MARK).split()]
        raise FitEnded

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def compare(
    pairs: int, plain: Callable[[int], list[float]], private: Callable[[int], list[float]]
) -> tuple[list[float], int]:
    """Take blocks of steps on both sides in turn; return the ratio of the median steps of each pair of blocks, private
    to plain, and the number of steps in a block. There are fewer pairs if a fit ends.

    Args:
        pairs: of blocks.
        plain: takes a number of steps, and returns the seconds of each.
        private: the same.
    """
    ratios: list[float] = []
    block = LEAST
    try:
        began, warm, spent = time.monotonic(), 0, list[float]()
        while warm < WARM_STEPS and time.monotonic() - began < WARM_SECONDS:
            spent = plain(LEAST)
            private(LEAST)
            warm += LEAST
        block = max(LEAST, min(MOST, int(BLOCK_SECONDS / max(statistics.median(spent), 1e-6))))
        for number in range(pairs):
            first, second = (plain, private) if number % 2 else (private, plain)
            one, two = statistics.median(first(block)), statistics.median(second(block))
            ratios.append(one / two if first is private else two / one)
    except FitEnded:
        pass
    return ratios, block


def ratios_of(case: str, pairs: int) -> tuple[list[float], int]:
    """Return the ratios of a case, see :func:`compare`."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.in_turn", case]
    with Side([*command, "plain"]) as plain, Side([*command, "private"]) as private:
        return compare(pairs, plain.steps, private.steps)


def serve(case: str, side: str) -> None:
    """Fit a case; before each block of steps, say what those of the last one took, and read how many follow."""
    from benchmarks.public_cases import registry

    registry.EPOCHS = 10**6  # before the cases read it; the other process ends the fit
    from benchmarks import public_modules

    out, sys.stdout = sys.stdout, sys.stderr
    spent: list[float] = []
    left = 0
    original = public_modules.clock

    def waiting(package: str) -> tuple[Any, list[float], list[Any]]:
        callback, times, ways = original(package)

        class Waiting(type(callback)):  # type: ignore[misc]
            __module__ = "lightning_dp.benchmark"  # as for the clock

            def on_train_batch_start(self, *args: Any) -> None:
                nonlocal left
                if left == 0:
                    print(_MARK + " ".join(map(repr, spent)), file=out, flush=True)
                    spent.clear()
                    left = int(sys.stdin.readline())
                left -= 1
                super().on_train_batch_start(*args)

            def on_train_batch_end(self, *args: Any) -> None:
                super().on_train_batch_end(*args)
                spent.append(times[-1])

        return Waiting(), times, ways

    public_modules.clock = waiting
    public_modules.fit(public_modules.CASES[case], private=side == "private")


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    os.chdir(Path(__file__).parents[1])
    serve(*sys.argv[1:])
