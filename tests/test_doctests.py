"""The examples in docstrings give what they show; the code of README and docs/ runs; what pages name is there."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import lightning_dp
from tests.cases import each

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").glob("*.md")])
}
#: Pages whose Python blocks show a form, and do not run.
FORMS = {"CONTRIBUTING.md"}
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


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if num_examples(text)])
def test_sessions_of_page(name: str) -> None:
    result = doctest.testfile(str(ROOT / name), module_relative=False)
    assert result.attempted == num_examples(TEXTS[name])
    assert result.failed == 0


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning")
@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if "```python" in text and name not in FORMS])
def test_code_of_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python blocks of a page, one after the other, as a reader would paste them; one with "..." is a sketch."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "..." not in block.partition("\n# Privacy: ")[0]]
    exec(compile("\n".join(blocks), name, "exec"), {"__name__": name})
    assert name not in ("docs/start.md", "README.md") or "Privacy: (epsilon=2.99" in capsys.readouterr().out


@each("name", TEXTS)
def test_links_of_page_lead_somewhere(name: str) -> None:
    """Pictures are pictures, and pages exist."""
    folder = (ROOT / name).parent
    for target in re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXTS[name]):
        assert (folder / target).read_bytes().startswith((b"\x89PNG", b"<?xml")), target
    for target in re.findall(r"(?<!!)\[[^]]+\]\(([^)#:]+)(?:#[\w-]+)?\)", TEXTS[name]):
        assert (folder / target).exists(), target


def test_every_public_name_is_in_the_reference() -> None:
    named = set(re.findall(r"\.\. auto\w+:: (?:lightning_dp\.)?(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert set(lightning_dp.__all__) <= named


def test_every_argument_is_in_one_group() -> None:
    """docs/arguments.md has one row for each argument of the strategies, in the group of what it changes."""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| ", TEXTS["docs/arguments.md"], re.MULTILINE)
    parameters = inspect.signature(lightning_dp.DPStrategy).parameters.values()
    assert sorted(name for name, _ in rows) == sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    for name, default in rows:
        value = inspect.signature(lightning_dp.DPStrategy).parameters[name].default
        assert value is None or default == f"`{value!r}`".replace("'", '"')


def test_readme_fits_on_two_screens() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 110
    assert 60 <= len(TEXTS["CONTRIBUTING.md"].splitlines()) <= 100


def test_citation_names_this_version() -> None:
    assert f"version: {lightning_dp.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{lightning_dp.__version__}]" in TEXTS["CHANGELOG.md"]


def test_changelog_names_tests_that_exist() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", TEXTS["CHANGELOG.md"])
    assert [name for name in named if f"def {name}(" not in code] == []
    assert all((ROOT / path).exists() for path in re.findall(r"`(tests/[\w/]+\.py)`", TEXTS["CHANGELOG.md"]))
