"""The README of the benchmarks: each benchmark writes its own section from its results."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).with_name("README.md")


def write_section(name: str, text: str, *, readme: Path = README) -> None:
    """Replace the text from ``<!-- name -->`` to ``<!-- /name -->``.

    Args:
        name: of the section.
        text: Markdown, made from results.
        readme: the file.

    Raises:
        ValueError: the file has no such section.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    page = readme.read_text()
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"Expected one section {name!r} in {readme.name}, got none or several. Add its two markers.")
    head, rest = page.split(begin)
    readme.write_text(head + begin + text.strip() + "\n" + end + rest.split(end)[1])
