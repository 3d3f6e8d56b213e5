"""How Sphinx builds these pages: ``sphinx-build -W docs site``.

Sphinx, since torch, Lightning, torchmetrics and Opacus use it, so that cross-references between them work alike; pages are
Markdown (MyST), the reference comes from the docstrings.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning_dp

project, author = "lightning_dp", "The lightning_dp authors"
release = lightning_dp.__version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "README.md"]
html_theme = "furo"
html_title = "lightning_dp"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring, napoleon_numpy_docstring = True, False

SECTION = re.compile(r"(Args|Returns|Raises|Example|References|Yields|Attributes):$")


def as_literal_blocks(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Show formulas (indented) and Markdown tables of a docstring as they stand; its sections are napoleon's."""
    out: list[str] = []
    inside = in_section = False
    for line in lines:
        in_section = in_section or bool(SECTION.match(line))
        literal = not in_section and line.startswith(("    ", "| ", "|-"))
        if literal and not inside:
            if out and out[-1]:
                out.append("")
            out += ["::", ""]
        if inside and not literal and line:
            out += [""] if out[-1] else []
        inside = literal or (inside and not line)
        out.append(f"    {line.removeprefix('    ')}" if literal else line)
    lines[:] = out


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_literal_blocks, priority=400)
