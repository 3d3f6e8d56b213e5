"""docs/troubleshooting.md has a row for every PrivacyError, found by the text that the error begins with."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lightning_dp
from tests.cases import each
from tests.sources import tree_of

PACKAGE = Path(lightning_dp.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text()
ROWS = re.findall(r"^\| `([^`]+)` \| (.+) \| (.+) \|$", PAGE, flags=re.MULTILINE)
#: Files whose error takes its text from a function of the same file.
COMPOSED = {
    "decisions.py": "Expected user code to set trainer.should_stop whatever the records are",
    "exchange.py": "One sample of a batch was",
    "real_losses.py": "User code did something new in the step before this one",
    "ways.py": "The gradient of a batch is not that of its records alone",
    "reading.py": "An item of the dataset was read, and",
    "independence.py": "Expected the gradient of every sample in a batch to be its gradient when run alone",
}


def text_of(node: ast.expr) -> str:
    """Return a message with an ellipsis for every value; "" where a function makes it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return ""


def messages() -> list[str]:
    """Return the text of every PrivacyError that the package raises."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        for node in ast.walk(tree_of(path)) if "Error(" in source else ():
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in ("PrivacyError", "ComparisonError", "UnlearnedError"):
                text = text_of(node.args[0]) if node.args else ""
                if len(text.replace("…", "").strip()) < 10:
                    text = COMPOSED[path.name]
                    assert text in source
                found.append(text)
    return sorted(set(found))


MESSAGES = messages()


@each("text", MESSAGES)
def test_every_privacy_error_is_explained(text: str) -> None:
    assert any(text.startswith(start) for start, *_ in ROWS)


def test_every_row_is_an_error_with_a_way_out() -> None:
    assert [start for start, *_ in ROWS if not any(text.startswith(start) for text in MESSAGES)] == []
    assert all(min(len(because), len(way_out)) > 5 for _, because, way_out in ROWS)
