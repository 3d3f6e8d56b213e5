"""Every example runs with ``--smoke``; its own assertions hold, and it prints a privacy statement."""

from __future__ import annotations

import ast
import logging
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import run_script

EXAMPLES = Path(__file__).parents[1] / "examples"
#: Run in processes of their own: two start themselves a second time, the others set what transformers does.
SLOW = {"fsdp", "hf_trainer", "text_lora", "two_processes"}
#: Run in this process, and take seconds even so.
LONG = {"combined", "digits_cnn", "fashion_mnist", "gan", "resume", "tabular", "users"}
#: tests/datalens/test_examples.py runs these.
ELSEWHERE = {"datalens_2d", "datalens_digits"}
NAMES = {path.stem for path in EXAMPLES.glob("*.py")} - ELSEWHERE


@pytest.fixture(autouse=True)
def _left_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Examples are scripts: they set variables of the environment, levels of loggers and the path of imports."""
    environment, logger = dict(os.environ), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    logger.setLevel(level)
    os.environ.clear()
    os.environ.update(environment)
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in sorted(NAMES - SLOW)]
)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--smoke"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "Privacy: (epsilon=" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_example_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    printed = run_script(EXAMPLES / f"{name}.py", "--smoke", folder=tmp_path)
    assert "Privacy: (epsilon=" in printed


def test_every_example_is_described() -> None:
    """The table of examples/README.md has a row for each, and each begins by saying what it shows and how to run it."""
    rows = [line for line in (EXAMPLES / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(f"{name}.py" for name in NAMES | ELSEWHERE)
    for name in NAMES | ELSEWHERE:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert f"python examples/{name}.py --smoke" in (ast.get_docstring(ast.parse(text)) or "")
