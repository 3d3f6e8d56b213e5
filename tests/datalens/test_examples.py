"""The examples run from end to end; their own assertions hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("datalens_2d", ["--smoke"]), ("datalens_2d", []), ("datalens_digits", ["--smoke"])],
    ids=["2d smoke", "2d whole", "digits smoke"],
)
def test_example(name: str, options: list[str]) -> None:
    picture = ROOT / "examples" / "out" / f"{name}.png"
    picture.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Privacy: (epsilon=" in done.stdout
    assert picture.stat().st_size > 5000
