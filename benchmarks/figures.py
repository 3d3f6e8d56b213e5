"""The shared style of the benchmarks' plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:grey")


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a figure with a number of panels, and the panels as a two-dimensional array."""
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)


def tidy(axis: Any, *, title: str, x: str, y: str) -> None:
    """Add labels and a light grid; remove the frame at the top and on the right."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, target: Path) -> None:
    """Write the picture and close the figure."""
    figure.savefig(target, dpi=100)
    plt.close(figure)
