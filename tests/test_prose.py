"""Plain English: no word that was hard to read, summaries that say what a thing is, names of tests that fit on a
line.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.sources import tree_of

ROOT = Path(__file__).parents[1]
FOLDERS = ("lightning_dp", "benchmarks", "tests", "docs", "examples")
SOURCES = sorted(
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.name != Path(__file__).name
)
OUTPUTS = ROOT / "examples" / "out"  # written by examples, which other tests run at the same time
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")))
    if OUTPUTS not in path.parents
)
#: Words and idioms that had to be read twice. Names in backticks are free.
BANNED = re.compile(
    r"\b(rooms?(?!:)|anew|afresh|hangs? on|speaks? of|lies?|lying|besides?|told|met|lets? go of"
    r"|stands? (in|beside|between|there)"
    r"|(view|norm|gradient|row|entry|column|logit|sentence|tensor|bytes|one) a (parameter|sample|step|record|layer|name"
    r"|rank|group|position|feature|teacher|submodule|coordinate|user))\b",
    re.IGNORECASE,
)
#: First words of a summary that leave open what it is about.
VAGUE = re.compile(r"(Each|From|Whose|What|Where|Whether|Which|Who|How|When|It|Its|This|That|They|Their)\b")
#: Verbs that do not command.
THIRD_PERSON = re.compile(
    r"(Adds|Asks|Begins|Brings|Called|Calls|Changes|Checks(?! of)|Computes|Counts|Draws|Forgets|Frees|Gives|Hands|"
    r"Holds|Keeps|Leaves|Logs|Makes|Moves|Raised|Reads|Refuses|Removes|Returns|Runs|Says|Sets|Stands|Stops|Stores|Takes|"
    r"Tells|Trains|Turns|Writes)\b"
)
COMMANDS, ARTICLES = re.compile(r"(Check|Get|Return|Tell)\b"), re.compile(r"(An?|One|The)\b")


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines: all of a page, and the strings and comments of a source file."""
    text = path.read_text()
    if path.suffix == ".md":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or tokenize.tok_name[token.type] in ("STRING", "FSTRING_MIDDLE"):
            yield from enumerate(token.string.splitlines(), token.start[0])


def banned_words(path: Path) -> Iterator[tuple[int, str]]:
    """Yield banned words with their lines; a search of the whole file first, since hardly any has one."""
    if BANNED.search(path.read_text()):
        for number, line in prose_of(path):
            if found := BANNED.search(re.sub(r"`+[^`]*`+", "", line)):
                yield number, found[0]


def test_prose_has_no_banned_word() -> None:
    assert len(SOURCES) > 400
    assert len(PAGES) > 20
    found = {path.relative_to(ROOT).as_posix(): [*banned_words(path)] for path in (*SOURCES, *PAGES)}
    assert {path: words for path, words in found.items() if words} == {}


def test_summaries_begin_with_a_verb_or_a_noun() -> None:
    """Functions command, modules, classes and properties are things. Ruff's D401 knows more verbs of functions."""
    found = []
    for path in (*(ROOT / "lightning_dp").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                decorators = "" if isinstance(node, ast.Module) else " ".join(map(ast.unparse, node.decorator_list))
                is_noun = isinstance(node, (ast.Module, ast.ClassDef)) or "property" in decorators
                wrong = COMMANDS if is_noun else ARTICLES
                if VAGUE.match(text) or THIRD_PERSON.match(text) or wrong.match(text):
                    found.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found == []


def test_names_of_tests_have_at_most_60_characters() -> None:
    files = [path for path in SOURCES if path.name.startswith("test_")]
    names = re.findall(r"def (test_\w+)", "\n".join(path.read_text() for path in files))
    assert [name for name in names if len(name) > 60] == []
