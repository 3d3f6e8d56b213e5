"""Settings of Sphinx: ``sphinx-build -W docs site``.

Pages are Markdown (MyST), tutorials are notebooks, the reference comes from the docstrings. Formulas become MathML,
which browsers draw themselves, so the site needs no network and no script for them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from myst_parser.parsers.sphinx_ import MystParser

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning_dp

project, author = "lightning_dp", "The lightning_dp authors"
release = lightning_dp.__version__
copyright = author
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown", ".ipynb": "notebook"}
autosummary_generate = False  # tables of names only; the entries are on the same page
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["site.css"]
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


class NotebookParser(MystParser):
    """A parser of notebooks: text cells are pages, code cells and their printed output are blocks."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse a notebook as the Markdown that it amounts to."""
        parts = []
        for cell in json.loads(inputstring)["cells"]:
            source = "".join(cell["source"])
            parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
            printed = "".join("".join(output["text"]) for output in cell.get("outputs", ()))
            parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
        super().parse("\n\n".join(parts), document)


def visit_math(translator: Any, node: nodes.math) -> None:
    """Write a formula within a line."""
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_displaymath(translator: Any, node: nodes.math_block) -> None:
    """Write a formula of its own."""
    translator.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Register the notebooks' parser, the formulas' writer and the hook on docstrings."""
    app.add_source_parser(NotebookParser)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect("autodoc-process-docstring", as_literal_blocks, priority=400)
