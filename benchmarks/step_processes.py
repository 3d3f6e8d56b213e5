"""Separate processes for both sides of a pair, so that neither sees the other's allocator, libraries or caches.

A process waits for its turn without computing. Lines of JSON go both ways: (case, mode, steps, warm-up) in; when each
step began, or why the mode does not run, out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from benchmarks.cases import CASES, Case

_MARK = "began: "  # libraries print as well


class DoesNotRun(Exception):
    """An error for a mode that cannot run a case; the message says why."""


class OwnProcesses:
    """Runner of each mode in its own process, from its first turn until the end of the ``with`` block.

    Args:
        command: what starts one; it must call :func:`serve`.
        make_clock: from when each step began to what the runs return.
    """

    def __init__(self, command: Sequence[str], make_clock: Callable[[list[float]], Any]) -> None:
        self._command = list(command)
        self._make_clock = make_clock
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __call__(self, case: Case, mode: str, steps: int, warmup: int) -> Any:
        """Run a number of steps of a case."""
        if mode not in self._processes:
            pipe = subprocess.PIPE
            self._processes[mode] = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
        process = self._processes[mode]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([case.name, mode, steps, warmup]) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith(_MARK):
                answer = json.loads(line.removeprefix(_MARK))
                if isinstance(answer, str):
                    raise DoesNotRun(answer)
                return self._make_clock(answer)
        process.communicate()
        raise DoesNotRun(f"its process ended with status {self._processes.pop(mode).returncode}")

    def __enter__(self) -> OwnProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()


def serve(run: Callable[[Case, str, int, int], list[float]]) -> None:
    """Answer from standard input until it ends."""
    for line in sys.stdin:
        name, mode, steps, warmup = json.loads(line)
        try:
            answer: Any = run(CASES[name], mode, steps, warmup)
        except Exception as error:  # a peer that cannot run a model is a result
            answer = f"{type(error).__name__}: {str(error)[:120]}"
        print(_MARK + json.dumps(answer), flush=True)
