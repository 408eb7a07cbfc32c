"""What `megacore bench calibrate` measured: a table, JSON and CSV, and a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megacore.bench import report
from megacore.bench.calibrate import Point
from megacore.cost.plot.colours import GREY, INK

COLUMNS = ("what", "dtype", "sizes", "ranks", "threads", "seconds", "flops", "num_bytes", "gflop_per_s", "gb_per_s")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
PRODUCTS = ("gemm", "gemm_dgrad", "gemm_wgrad")


def as_dict(point: Point) -> dict[str, Any]:
    """Plain data, with speeds."""
    return {
        **asdict(point),
        "sizes": list(point.sizes),
        "gflop_per_s": point.flops / point.seconds / 1e9,
        "gb_per_s": point.num_bytes / point.seconds / 1e9,
    }


def table(points: Sequence[Point]) -> str:
    """For the terminal."""
    lines = [f"{'what':24} {'dtype':5} {'sizes':>20}  ranks threads   microseconds   GFLOP/s    GB/s"]
    for point in points:
        one = as_dict(point)
        speed = f"{one['gflop_per_s']:9.1f}" if point.flops else " " * 9
        bandwidth = f"{one['gb_per_s']:7.2f}" if point.num_bytes else ""
        sizes = " x ".join(map(str, point.sizes))
        lines.append(
            f"{point.what:24} {point.dtype:5} {sizes:>20}  {point.ranks:5} {point.threads:7}  "
            f"{1e6 * point.seconds:13.1f} {speed} {bandwidth}".rstrip()
        )
    return "\n".join(lines)


def write(folder: Path, name: str, points: Sequence[Point], on: Mapping[str, object]) -> list[Path]:
    """Write NAME.json, NAME.csv and, with matplotlib, NAME.svg; returns the paths."""
    rows = [as_dict(point) for point in points]
    lines = [
        [" ".join(map(str, row[column])) if column == "sizes" else row[column] for column in COLUMNS] for row in rows
    ]
    paths = report.store(folder, name, {"machine": on, "points": rows}, COLUMNS, lines)
    picture = folder / f"{name}.svg"
    return [*paths, picture] if draw(points, picture, str(on.get("device") or on.get("cpu", ""))) else paths


def draw(points: Sequence[Point], path: Path, title: str) -> bool:
    """Speeds of products by their FLOPs, and times of collectives by their bytes. False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    left, right = figure.subplots(1, 2)
    kinds = sorted({(point.what, point.dtype, point.threads) for point in points if point.what in PRODUCTS})
    for shape, (what, dtype, threads) in zip("osDv^<>phX*d" * len(kinds), kinds):
        own = [point for point in points if (point.what, point.dtype, point.threads) == (what, dtype, threads)]
        speeds = [point.flops / point.seconds / 1e9 for point in own]
        label = f"{what}, {dtype}, {threads} thread{'s' * (threads > 1)}"
        left.plot([point.flops for point in own], speeds, shape, markersize=4, label=label)
    left.set(xscale="log", xlabel="FLOPs of a product", ylabel="GFLOP/s")
    left.legend(fontsize=6)
    groups = sorted({(point.what, point.ranks) for point in points if point.what in COLLECTIVES})
    for what, ranks in groups:
        own = sorted((p for p in points if (p.what, p.ranks) == (what, ranks)), key=lambda point: point.num_bytes)
        label = f"{what}, {ranks} ranks"
        right.plot([p.num_bytes for p in own], [1e3 * p.seconds for p in own], ".-", linewidth=1, label=label)
    right.set(xscale="log", yscale="log", xlabel="bytes of the whole tensor", ylabel="milliseconds")
    if groups:
        right.legend(fontsize=6)
    for axes in (left, right):
        axes.grid(color=GREY, linewidth=0.3)
    figure.suptitle(title, fontsize=9, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
