"""docs/guarantees.md names a test for every guarantee and every pitfall; each of them is there and runs."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from tests.cases import each

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
NODES = sorted(set(NODE.findall(PAGE)))
SEVERITIES = {"void", "understated", "leak", "stop", "waste"}


def rows(start: str) -> dict[str, list[str]]:
    """First cell -> other cells, of the table rows whose first cell matches."""
    lines = re.findall(rf"^\| ({start}) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert len({name for name, _ in lines}) == len(lines)
    return {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in lines}


@functools.cache
def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def decorators(node: ast.FunctionDef) -> str:
    return " ".join(ast.unparse(decorator) for decorator in node.decorator_list)


@each("path, name", NODES)
def test_named_test_exists_and_runs(path: str, name: str) -> None:
    """Not skipped, not expected to fail, and with something that can: an assertion, or an error it waits for."""
    assert name.startswith("test_")
    found = functions(ROOT / path)
    assert name in found
    assert not re.search(r"\b(skip|xfail)\b", decorators(found[name]))
    called = {ast.unparse(node.func) for node in ast.walk(found[name]) if isinstance(node, ast.Call)}
    helpers = [found[each] for each in called & found.keys()]
    body = [inner for function in (found[name], *helpers) for inner in ast.walk(function)]
    checks = {"pytest.raises", "torch.testing.assert_close"}
    imported = {each for each in called if each.startswith(("check", "assert"))}
    assert (
        any(isinstance(inner, ast.Assert) for inner in body)
        or any(isinstance(inner, ast.Call) and ast.unparse(inner.func) in checks for inner in body)
        or imported
    )


def test_every_mention_of_a_test_is_a_node_id() -> None:
    assert PAGE.count("::") == len(NODE.findall(PAGE))


def test_every_guarantee_has_tests() -> None:
    guarantees = rows(r"I\d")
    assert list(guarantees) == [f"I{number}" for number in range(1, 10)]
    for promise, tests in guarantees.values():
        assert len(promise) > 40
        assert NODE.findall(tests)


def test_every_pitfall_has_a_severity_an_answer_and_tests() -> None:
    pitfalls = rows(r"\d+")
    assert list(pitfalls) == [str(number) for number in range(1, 26)]
    for pitfall, severity, answer, tests in pitfalls.values():
        assert severity in SEVERITIES
        assert min(len(pitfall), len(answer)) > 30
        assert NODE.findall(tests)
