"""The tutorials are notebooks; each runs from its first cell to its last, where its own assertions hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
NOTEBOOKS = sorted(path.stem for path in TUTORIALS.glob("*.ipynb"))


def code_cells(name: str) -> list[dict[str, Any]]:
    """Return the code cells of a notebook."""
    notebook = json.loads((TUTORIALS / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": name}
    for cell in code_cells(name):
        exec(compile("".join(cell["source"]), f"{name}, cell {cell['execution_count']}", "exec"), namespace)
    assert "Privacy: (epsilon=" in capsys.readouterr().out


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_shows_what_it_printed(name: str) -> None:
    """Cells are numbered in order, and the privacy statement is among the printed text."""
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    printed = ["".join(output["text"]) for cell in cells for output in cell["outputs"]]
    assert any("Privacy: (epsilon=" in text for text in printed)
    assert any("assert " in "".join(cell["source"]) for cell in cells)


def test_every_notebook_is_in_the_table_and_the_menu() -> None:
    page = (TUTORIALS / "index.md").read_text()
    assert sorted(re.findall(r"^\| \[[^]]+\]\((\w+)\.ipynb\)", page, re.MULTILINE)) == NOTEBOOKS
    assert sorted(re.findall(r"^(\w+)$", page.split("```{toctree}")[1], re.MULTILINE)) == NOTEBOOKS
