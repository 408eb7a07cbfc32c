"""A heat map of measured layouts, and the predicted beside the measured times."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacore.bench.layouts import Measured, compare, words
from megacore.cost.plot.colours import INK

GREY = "#d0d0d0"


def draw(found: Sequence[Measured], path: Path) -> bool:
    """False without matplotlib. A row for each tp x pp, a column for dp and whatever else differs; layouts that failed
    are hatched and say why."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = sorted({_row(one) for one in found})
    columns = sorted({_column(one) for one in found})
    predicted = any(one.predicted for one in found)
    width = max(6.0, 1.3 * len(columns) + 2.5) + 5 * predicted
    figure = Figure(figsize=(width, max(4.2, 0.62 * len(rows) + 1.8)), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    panels = figure.subplots(1, 1 + predicted, squeeze=False)[0]
    _heat_map(panels[0], found, rows, columns)
    if predicted:
        _scatter(panels[1], found)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _row(one: Measured) -> tuple[int, int]:
    p = one.trial.config.parallel
    return p.tp, p.pp


def _column(one: Measured) -> tuple[int, str]:
    p = one.trial.config.parallel
    words = [f"dp{max(1, p.dp)}"]
    words += [f"zero{p.zero}"] * (p.zero > 0) + ["sequence"] * p.sequence_parallel
    words += [p.schedule] * (p.pp > 1 and p.schedule != "1f1b")
    words += [p.recompute] * (p.recompute != "none")
    return max(1, p.dp), "\n".join(words)


def _heat_map(axes: Any, found: Sequence[Measured], rows: Sequence[tuple[int, int]], columns: Sequence[Any]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    times = [one.median for one in found if one.median is not None]
    low, high = min(times, default=0.0), max(times, default=1.0)
    for one in found:
        x, y = columns.index(_column(one)), rows.index(_row(one))
        if one.median is None:
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor="white", edgecolor=GREY, hatch="////"))
            axes.text(x + 0.5, y + 0.5, one.status, ha="center", va="center", fontsize=7, color=INK)
            continue
        share = (one.median - low) / (high - low) if high > low else 0.0
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colormaps["viridis_r"](0.1 + 0.8 * share), edgecolor="white"))
        dark = share > 0.55
        axes.text(
            x + 0.5,
            y + 0.5,
            f"{1e3 * one.median:.0f} ms",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else INK,
        )
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.set_xticks([x + 0.5 for x in range(len(columns))], [label for _, label in columns], fontsize=7)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [f"tp{tp} pp{pp}" for tp, pp in rows], fontsize=8)
    axes.tick_params(length=0)
    axes.set_title("a step, median of rounds", fontsize=9, color=INK)


def _scatter(axes: Any, found: Sequence[Measured]) -> None:
    both = [(one.median, one.predicted, one) for one in found if one.median and one.predicted]
    most = max(max(measured, predicted) for measured, predicted, _ in both) if both else 1.0
    axes.plot([0, 1.05 * most], [0, 1.05 * most], color=GREY, linewidth=1)
    for measured, predicted, one in both:
        axes.plot([predicted], [measured], "o", color="#2b6cb0", markersize=4)
        axes.annotate(
            one.trial.label, (predicted, measured), fontsize=5.5, color=INK, xytext=(4, -2), textcoords="offset points"
        )
    axes.set(xlim=(0, 1.05 * most), ylim=(0, 1.05 * most), xlabel="predicted s", ylabel="measured s")
    ranking = compare(found)
    title = "" if ranking is None else words(ranking).replace("; ", ";\n")
    axes.set_title(title, fontsize=6, color=INK)
