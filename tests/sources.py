"""Source files as trees: several tests read all of them, and one reading takes a second."""

from __future__ import annotations

import ast
import functools
from pathlib import Path


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a file, for reading only."""
    return ast.parse(path.read_text())
