"""One of two processes dies or hangs within a step: the other ends by itself, and says why."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.processes import ends_of_script

SCRIPT = Path(__file__).with_name("lost_rank_run.py")


def run(folder: Path, victim: int, how: str, kind: str, *, ranks: int = 1) -> tuple[str, float]:
    """Return what the survivor said, and how many seconds after the start.

    Args:
        folder: takes what both write.
        victim: rank that is lost.
        how: it is lost.
        kind: of the parameters.
        ranks: started here; one launches the other.
    """
    start = time.monotonic()
    said = folder / f"error{1 - victim}"
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ends_of_script, SCRIPT, folder, victim, how, kind, folder=folder, ranks=ranks)
        try:
            while time.monotonic() < start + 120 and not said.exists():
                time.sleep(0.1)
            assert said.exists(), "the survivor still waits for the other rank"
            return said.read_text(), time.monotonic() - start
        finally:  # end what was stopped, or its launcher with all of its session
            for file in folder.glob("pid*"):
                with suppress(ProcessLookupError):
                    os.killpg(int(file.read_text()), signal.SIGKILL)


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
    said, seconds = run(tmp_path, victim, how, "replicated")
    check_reason(said)
    assert seconds < 100


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_other_rank_of_a_sharded_run_ends_and_says_why(tmp_path: Path, how: str) -> None:
    """Forwards communicate, so it is noticed before the release."""
    said, seconds = run(tmp_path, 1, how, "sharded", ranks=2)
    assert "Expected every rank to take part in" in said
    assert "resume all of them from the newest checkpoint" in said
    releases, steps = map(int, said.split()[-2:])
    assert releases == steps == 2
    assert seconds < 100
