"""The loss curve as a picture: training and validation loss above, learning rate and gradient norm below."""

import math
from pathlib import Path
from typing import Any

from megacore.monitor.console import human_count
from megacore.monitor.curves import Curves, Point, smooth

INK, GREY, BLUE, ORANGE, GREEN, PURPLE = "#1f2430", "#8a93a3", "#2f6fde", "#e07b29", "#2a9d6f", "#8458b3"


def save_loss_plot(curves: Curves, path: Path, title: str, subtitle: str = "") -> None:
    """Draws the curves of a run into a PNG, SVG or PDF file. Needs the `plots` extra (matplotlib).

    title: the model, say; subtitle: the layout and what else is worth knowing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f'plots need matplotlib ({error}); run: pip install "megacore[plots]"') from error
    figure = Figure(figsize=(8.6, 6.0), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    grid = figure.add_gridspec(
        2, 2, height_ratios=(3.1, 1), hspace=0.46, wspace=0.24, left=0.085, right=0.965, top=0.855, bottom=0.085
    )
    loss = figure.add_subplot(grid[0, :])
    _draw_loss(loss, curves)
    _draw_small(figure.add_subplot(grid[1, 0]), curves.lr, "learning rate", PURPLE)
    _draw_small(figure.add_subplot(grid[1, 1]), curves.grad_norm, "gradient norm", GREEN, soften=True)
    figure.text(0.085, 0.945, title, fontsize=14, fontweight="bold", color=INK, va="center")
    figure.text(0.085, 0.902, subtitle, fontsize=9.5, color=GREY, va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_loss(axes: Any, curves: Curves) -> None:
    _clean(axes)
    ends: list[tuple[Point, str]] = []
    if curves.loss:
        smoothed = smooth(curves.loss, len(curves.loss) // 20)
        axes.plot(
            *zip(*curves.loss, strict=True), color=BLUE, alpha=0.25, linewidth=0.9, label="training, logged steps"
        )
        axes.plot(*zip(*smoothed, strict=True), color=BLUE, linewidth=1.9, label="training, smoothed")
        ends.append((smoothed[-1], BLUE))
    if curves.val_loss:
        style = {"color": ORANGE, "markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 1.0}
        axes.plot(*zip(*curves.val_loss, strict=True), "o", label="validation", **style)
        ends.append((curves.val_loss[-1], ORANGE))
    _note_ends(axes, ends)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.set_xlabel(f"step  ({human_count(curves.tokens)} tokens in total)" if curves.tokens else "step", color=INK)
    if ends:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")


def _draw_small(axes: Any, points: list[Point], title: str, colour: str, soften: bool = False) -> None:
    _clean(axes)
    exponent = _exponent(points)
    unit = rf"  ($\times 10^{{{exponent}}}$)" if exponent else ""
    points = [(step, value / 10.0**exponent) for step, value in points]
    axes.set_title(title + unit, fontsize=9.5, color=INK, loc="left", pad=6)
    axes.tick_params(labelsize=8)
    if not points:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=9)
        return
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.9 if soften else 1.6, alpha=0.3 if soften else 1)
    if soften:
        axes.plot(*zip(*smooth(points, len(points) // 20), strict=True), color=colour, linewidth=1.6)
        # One spike at the start would flatten the rest: the panel is about the usual size.
        usual = sorted(value for _, value in points)[int(0.98 * (len(points) - 1))]
        axes.set_ylim(0, usual * 1.25 or 1)
    else:
        axes.set_ylim(bottom=0)


def _exponent(points: list[Point]) -> int:
    """The power of ten to take out of the axis, so that 0.003 reads as 3; 0 for everyday sizes."""
    largest = max((abs(value) for _, value in points), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    return exponent if exponent < -1 or exponent > 3 else 0


def _clean(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c9cfd8")
    axes.grid(axis="y", color="#e9ecf1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelsize=9, length=3)
    axes.margins(x=0.02)


def _note_ends(axes: Any, ends: list[tuple[Point, str]]) -> None:
    """Writes the last value of each curve beside its end, the larger one above."""
    axes.margins(x=0.045, y=0.08)
    for place, (point, colour) in enumerate(sorted(ends, key=lambda end: end[0][1])):
        shift = 0 if len(ends) == 1 else 7 if place else -7
        axes.annotate(
            f"{point[1]:.2f}",
            point,
            xytext=(8, shift),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            fontweight="bold",
            color=colour,
        )
