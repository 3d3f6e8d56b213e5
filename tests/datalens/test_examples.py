"""The examples run from end to end; their own assertions hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_script

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("datalens_2d", ["--smoke"]), ("datalens_2d", []), ("datalens_digits", ["--smoke"])],
    ids=["2d smoke", "2d whole", "digits smoke"],
)
def test_example(name: str, options: list[str], tmp_path: Path) -> None:
    picture = ROOT / "examples" / "out" / f"{name}.png"
    picture.unlink(missing_ok=True)
    printed = run_script(ROOT / "examples" / f"{name}.py", *options, folder=tmp_path)
    assert "Privacy: (epsilon=" in printed
    assert picture.stat().st_size > 5000
