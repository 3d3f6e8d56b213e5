"""Tables and JSON on the terminal; rich is optional."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

GAP = "  "


def write(text: str) -> None:
    """Write one block of text to the standard output."""
    sys.stdout.write(text + "\n")


def write_json(value: Any) -> None:
    """Write plain values as strict JSON; infinite numbers must be strings already."""
    write(json.dumps(value, indent=2, allow_nan=False))


def write_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table that fits the terminal if possible; only the last column is wrapped."""
    if find_spec("rich") is None:
        write(plain_table(columns, rows, shutil.get_terminal_size().columns))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=place < len(columns) - 1)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(file=sys.stdout, soft_wrap=False).print(table)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Return a table as plain text of a given width, with the last column wrapped.

    Example:
        >>> print(plain_table(["name", "note"], [["pld", "tight, and the default"]], width=18))
        name  note
        pld   tight, and
              the default
    """
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)][:-1]
    indent = sum(widths) + len(GAP) * len(widths)
    lines = []
    for row in (columns, *rows):
        start = "".join(cell.ljust(size) + GAP for cell, size in zip(row, widths, strict=False))
        parts = textwrap.wrap(row[-1], max(20 if width > 40 else 10, width - indent)) or [""]
        lines.append((start + parts[0]).rstrip())
        lines += [" " * indent + part for part in parts[1:]]
    return "\n".join(lines)
