"""The examples in docstrings give what they show, and the pages of docs/ run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import lightning_dp

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
MODULES = sorted(info.name for info in pkgutil.walk_packages(lightning_dp.__path__, "lightning_dp."))


def num_examples(text: str) -> int:
    return len(re.findall(r"^\s*>>> ", text, flags=re.MULTILINE))


def with_examples(module: str) -> bool:
    path = Path(lightning_dp.__file__).parent.joinpath(*module.split(".")[1:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return num_examples(source.read_text()) > 0


@pytest.mark.parametrize("name", [name for name in MODULES if with_examples(name)])
def test_docstrings_of(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", [name for name in PAGES if num_examples((DOCS / name).read_text())])
def test_sessions_of_page(name: str) -> None:
    result = doctest.testfile(str(DOCS / name), module_relative=False)
    assert result.attempted == num_examples((DOCS / name).read_text())
    assert result.failed == 0


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning")
@pytest.mark.parametrize("name", PAGES)
def test_code_of_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python blocks of a page, one after the other, as a reader would paste them; one with "..." is a sketch."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "..." not in block]
    exec(compile("\n".join(blocks), name, "exec"), {"__name__": name})
    assert name != "start.md" or "Privacy: (epsilon=2.99" in capsys.readouterr().out


@pytest.mark.parametrize("name", PAGES)
def test_pictures_of_page_exist(name: str) -> None:
    for target in re.findall(r"!\[[^]]+\]\(([^)]+)\)", (DOCS / name).read_text()):
        assert (DOCS / target).read_bytes().startswith((b"\x89PNG", b"<?xml")), target


def test_every_public_name_is_in_the_reference() -> None:
    named = set(re.findall(r"\.\. auto\w+:: (?:lightning_dp\.)?(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert set(lightning_dp.__all__) <= named
