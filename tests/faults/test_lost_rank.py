"""One of two processes dies or hangs within a step: the other ends by itself, and says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ends_of_script

SCRIPT = Path(__file__).with_name("lost_rank_run.py")


def run(folder: Path, victim: int, how: str, kind: str = "replicated") -> tuple[str, float]:
    """Returns what the survivor said, and how many seconds after the start it was gone."""
    start = time.monotonic()
    launched = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), str(victim), how, kind],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    said = folder / f"error{1 - victim}"
    try:
        while time.monotonic() < start + 120 and not said.exists():
            time.sleep(0.1)
        assert said.exists(), "the survivor still waits for the other rank"
        return said.read_text(), time.monotonic() - start
    finally:
        os.killpg(launched.pid, signal.SIGKILL)  # the session that this test began: what was stopped, and its launcher
        launched.wait()


def check_reason(said: str) -> None:
    """It is noticed before the release, when ranks agree on the checks of the step."""
    assert "Expected every rank to take part in a choice that all make alike, got" in said
    assert "resume all of them from the newest checkpoint" in said
    releases, steps = map(int, said.split()[-2:])
    assert releases == steps == 2


def test_the_other_rank_ends_and_says_why(tmp_path: Path) -> None:
    """Each rank is started by itself, as torchrun does it."""
    killed, ended = ends_of_script(SCRIPT, tmp_path, 0, "killed", "replicated", folder=tmp_path, ranks=2)
    assert (killed, ended) == (-signal.SIGKILL, 1)
    check_reason((tmp_path / "error1").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "how"),
    [
        pytest.param(1, "killed", id="killed"),
        pytest.param(0, "killed", id="launcher_killed"),
        pytest.param(1, "stopped", id="stopped"),
    ],
)
def test_the_other_rank_of_a_launched_run_ends(tmp_path: Path, victim: int, how: str) -> None:
    """Ranks wait 5 seconds for one that is stopped."""
    said, seconds = run(tmp_path, victim, how)
    check_reason(said)
    assert seconds < 100


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_other_rank_of_a_sharded_run_ends_and_says_why(tmp_path: Path, how: str) -> None:
    """Forwards communicate, so it is noticed before the release."""
    said, seconds = run(tmp_path, 1, how, "sharded")
    assert "Expected every rank to take part in" in said
    assert "resume all of them from the newest checkpoint" in said
    releases, steps = map(int, said.split()[-2:])
    assert releases == steps == 2
    assert seconds < 100
