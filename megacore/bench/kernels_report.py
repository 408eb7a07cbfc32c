"""How kernels' times are shown and kept: a table, JSON, CSV, and a roofline as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megacore.bench import report
from megacore.bench.kernels import COMPILED, COPY, FORWARD, LIGER, Measured

RATIOS = ("eager", "compile", "liger")
COLUMNS = ("best_s", "median_s", "gb_per_s", "gflop_per_s", "share", *(f"faster_than_{other}" for other in RATIOS))

INK, BLUE, ORANGE = "#1f2430", "#2f6fde", "#e07b29"
ROWS = 36
"""Of the legend, in each of its columns."""


def as_dict(measured: Measured) -> dict[str, Any]:
    """The operation as plain data: times in seconds; rates, shares and ratios at the medians."""
    timings = report.as_dict(measured.comparison)
    median = {side.name: side.median for side in measured.comparison.sides}
    for row in timings["sides"]:
        side = row["side"]
        is_copy = side == COPY
        row["gb_per_s"] = (measured.roof.bandwidth if is_copy else measured.bandwidth(side)) / 1e9
        row["gflop_per_s"] = 0.0 if is_copy else measured.speed(side) / 1e9
        row["share"] = None if is_copy else measured.share(side)
        others = {"eager": measured.reference, "compile": COMPILED, "liger": LIGER}
        for short, other in others.items():
            known = other in median and not is_copy
            row[f"faster_than_{short}"] = median[other] / median[side] if known else None
    return timings | {
        "operation": measured.operation,
        "pass": measured.step,
        "bytes": measured.num_bytes,
        "flops": measured.flops,
        "bound": "memory" if measured.is_bound_by_memory else "arithmetic",
        "copy_gb_per_s": measured.roof.bandwidth / 1e9,
        "peak_gflop_per_s": measured.peak / 1e9,
    }


def table(found: Sequence[Measured]) -> str:
    """Text for the terminal, one block per operation and pass."""
    blocks = []
    for one in found:
        whole = as_dict(one)
        rows = whole["sides"]
        width = max(len(row["side"]) for row in rows)
        settings = ", ".join(f"{name} {value}" for name, value in whole["settings"].items())
        limit = "copy" if whole["bound"] == "memory" else "peak"
        lines = [
            f"{whole['name']} ({settings}; {one.num_bytes / 1e6:.1f} MB, {one.flops / 1e9:.2f} GFLOP)",
            f"  {'':{width}}   best ms  median ms   GB/s  GFLOP/s  of {limit}  x eager  x compile  x liger",
        ]
        for row in rows:
            share = "" if row["share"] is None else f"{100 * row['share']:.0f}%"
            ratios = [row[f"faster_than_{other}"] for other in RATIOS]
            told = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            lines.append(
                f"  {row['side']:{width}}  {1e3 * row['best_s']:8.3f}  {1e3 * row['median_s']:9.3f}  "
                f"{row['gb_per_s']:5.1f}  {row['gflop_per_s']:7.1f}  {share:>7}  {told[0]:>7}  {told[1]:>9}  "
                f"{told[2]:>7}".rstrip()
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def write(folder: Path, name: str, found: Sequence[Measured], on: Mapping[str, object]) -> list[Path]:
    """Write NAME.json (everything), NAME.csv (one line per side) and, with matplotlib, NAME.svg; returns the paths."""
    cases = [as_dict(one) for one in found]
    first = ("operation", "pass", "bound", "bytes", "flops")
    lines = [
        [*(case[key] for key in first), row["side"], *(row[column] for column in COLUMNS)]
        for case in cases
        for row in case["sides"]
    ]
    paths = report.store(folder, name, {"machine": on, "cases": cases}, (*first, "side", *COLUMNS), lines)
    picture = folder / f"{name}.svg"
    return [*paths, picture] if draw(found, picture, str(on.get("device") or on.get("cpu", ""))) else paths


def draw(found: Sequence[Measured], path: Path, title: str) -> bool:
    """The roofline: every operation's fastest backend at its FLOPs per byte. False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 6.4), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    axes = figure.add_axes((0.07, 0.09, 0.6, 0.84))
    bandwidth = max(one.roof.bandwidth for one in found)
    peak = max(one.peak for one in found)
    points = [(one.flops / one.num_bytes, *_fastest(one), one) for one in found]
    ridge = peak / bandwidth
    left, right = min(point[0] for point in points) / 2, 2 * max(ridge, *(point[0] for point in points))
    axes.plot([left, ridge, right], [left * bandwidth / 1e9, peak / 1e9, peak / 1e9], color=INK, linewidth=1.4)
    roofs = f"roof: {bandwidth / 1e9:.0f} GB/s copied, {peak / 1e9:.0f} GFLOP/s multiplied"
    figure.text(0.69, 0.955, "fastest backends; round: forward, square: with backward", fontsize=7, color=INK)
    figure.text(0.69, 0.93, roofs, fontsize=7, color=INK)
    for number, (intensity, speed, side, one) in enumerate(points, 1):
        shape, colour = ("o", BLUE) if one.step == FORWARD else ("s", ORANGE)
        axes.plot([intensity], [speed / 1e9], shape, color=colour, markersize=5)
        place: dict[str, Any] = {"xytext": (4, 2), "textcoords": "offset points"}
        axes.annotate(str(number), (intensity, speed / 1e9), fontsize=6, color=INK, **place)
        row, column = (number - 1) % ROWS, (number - 1) // ROWS
        text = f"{number}  {one.operation}, {one.comparison.settings['dtype']} ({side})"
        figure.text(0.69 + 0.16 * column, 0.9 - 0.8 * row / ROWS, text, fontsize=5.5, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s")
    axes.set_title(title, fontsize=9, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _fastest(one: Measured) -> tuple[float, str]:
    """FLOP/s and name of the fastest side that is a backend."""
    sides = [side for side in one.comparison.sides if side.name not in (COPY, COMPILED, LIGER)]
    best = min(sides, key=lambda side: side.median)
    return one.speed(best.name), best.name
