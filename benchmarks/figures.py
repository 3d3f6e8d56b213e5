"""The look that the benchmarks' plots share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:grey")


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure of so many panels, and the panels as an array of two dimensions."""
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)


def tidy(axis: Any, *, title: str, x: str, y: str) -> None:
    """Labels, a light grid, no frame above and to the right."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, target: Path) -> None:
    """Writes the picture and lets go of the figure."""
    figure.savefig(target, dpi=100)
    plt.close(figure)
