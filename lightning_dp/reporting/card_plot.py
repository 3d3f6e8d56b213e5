"""A plot of epsilon over the steps of a run and of the success of attacks; matplotlib is optional."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from lightning_dp.reporting.statement import describe_epsilon

_EPSILON, _TARGET, _ATTACK = "tab:blue", "tab:red", "tab:orange"


def can_plot() -> bool:
    """Tell whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_card(
    points: Sequence[Sequence[Any]],
    attacks: Sequence[Sequence[float]],
    *,
    delta: float,
    target: float | None = None,
) -> bytes | None:
    """Plot epsilon over steps, and the largest true positive rate of an attack over its false positive rate.

    Args:
        points: pairs (step, epsilon); an epsilon may be the string "inf".
        attacks: pairs (false positive rate, largest true positive rate), ascending and above 0.
        delta: delta at which epsilon is stated, for the label.
        target: target epsilon to mark in the plot.

    Returns:
        The plot as SVG; None if no epsilon is finite.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    finite = [(int(step), float(value)) for step, value in points if math.isfinite(float(value))]
    if not finite:
        return None
    # no pyplot: the figure belongs to nobody's session and needs no display
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    canvas: Any = FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    _draw_epsilon(left, finite, delta, target)
    _draw_attacks(right, attacks)
    picture = io.BytesIO()
    canvas.print_svg(picture, metadata={"Date": None})
    return picture.getvalue()


def _draw_epsilon(axis: Any, points: list[tuple[int, float]], delta: float, target: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, epsilons = zip(*points, strict=True)
    # the first step alone may cost most of it, so nothing joins it with zero
    axis.plot(steps, epsilons, marker="o", markersize=3, color=_EPSILON)
    axis.set_title(f"epsilon = {describe_epsilon(epsilons[-1])} after {steps[-1]} steps", fontsize="medium")
    if target is not None:
        axis.axhline(target, linestyle="--", linewidth=1, color=_TARGET)
        axis.annotate(f"target {target:g}", (0, target), xytext=(2, 3), textcoords="offset points", color=_TARGET)
    axis.set_xlabel("logical step")
    axis.set_ylabel(f"epsilon at delta = {delta:g}")
    axis.set_xlim(0, steps[-1] * 1.02)
    axis.set_ylim(0, 1.15 * max(*epsilons, target or 0.0, 1e-9))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)


def _draw_attacks(axis: Any, attacks: Sequence[Sequence[float]]) -> None:
    wrong, right = zip(*attacks, strict=True)
    axis.loglog(wrong, right, color=_ATTACK, label="any attack, at most")
    axis.loglog(wrong, wrong, linestyle="--", linewidth=1, color="tab:gray", label="guessing")
    axis.fill_between(wrong, wrong, right, color=_ATTACK, alpha=0.15)
    axis.set_title("is a given record in the training data?", fontsize="medium")
    axis.set_xlabel("wrong claims (false positive rate)")
    axis.set_ylabel("right claims (true positive rate)")
    axis.set_xlim(wrong[0], 1)
    axis.set_ylim(wrong[0], 1.3)
    axis.legend(loc="upper left", fontsize="small")
    axis.grid(alpha=0.3, which="major")
