"""Epsilon over the steps of a run, as a picture; matplotlib is optional."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from lightning_dp.reporting.statement import describe_epsilon


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_epsilon(points: Sequence[Sequence[Any]], *, delta: float, target: float | None = None) -> bytes | None:
    """Draws epsilon over steps, beginning at 0.

    Args:
        points: pairs (step, epsilon); an epsilon may be the string "inf".
        delta: for the label.
        target: an epsilon to mark.

    Returns:
        The picture as SVG; None where no epsilon is finite, which leaves nothing to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    finite = [(int(step), float(value)) for step, value in points if math.isfinite(float(value))]
    if not finite:
        return None
    # no pyplot: the figure belongs to nobody's session and needs no display
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    canvas: Any = FigureCanvasSVG(figure)
    axis = figure.add_subplot()
    steps, epsilons = zip((0, 0.0), *finite, strict=True)
    axis.plot(steps, epsilons, marker="o", markersize=3, color="tab:blue")
    axis.set_title(f"epsilon = {describe_epsilon(epsilons[-1])} after {steps[-1]} steps", fontsize="medium")
    if target is not None:
        axis.axhline(target, linestyle="--", linewidth=1, color="tab:red")
        axis.annotate(f"target {target:g}", (0, target), xytext=(2, 3), textcoords="offset points", color="tab:red")
    axis.set_xlabel("logical step")
    axis.set_ylabel(f"epsilon at delta = {delta:g}")
    axis.set_xlim(0, steps[-1] * 1.02)
    axis.set_ylim(0, 1.15 * max(*epsilons, target or 0.0))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    picture = io.BytesIO()
    canvas.print_svg(picture, metadata={"Date": None})
    return picture.getvalue()
