"""How optimizers' steps are shown and kept: a table for the reader, JSON and CSV for the next comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megacore.bench import report
from megacore.bench.optim import COPY, TORCH, Measured

COLUMNS = (
    "kernel",
    "best_s",
    "median_s",
    "state_bytes_per_parameter",
    "gb_per_s",
    "share_of_copy",
    "faster_than_torch",
)


def as_dict(measured: Measured) -> dict[str, Any]:
    """The case as plain data: times in seconds, bandwidths at the median, ratios to torch median against median."""
    timings = report.as_dict(measured.comparison)
    torch, copy = measured.comparison.side(TORCH).median, measured.bandwidth(COPY)
    for row in timings["sides"]:
        side, bandwidth = measured.sides[row["side"]], measured.bandwidth(row["side"])
        row["kernel"] = side.kernel
        row["state_bytes_per_parameter"] = side.state
        row["gb_per_s"] = bandwidth / 1e9
        row["share_of_copy"] = bandwidth / copy
        row["faster_than_torch"] = torch / row["median_s"]
    return timings


def table(found: Sequence[Measured]) -> str:
    """Text for the terminal, one block per case."""
    blocks = []
    for one in found:
        rows = as_dict(one)["sides"]
        width = max(len(row["side"]) for row in rows)
        settings = ", ".join(f"{name} {value}" for name, value in one.comparison.settings.items())
        lines = [
            f"{one.comparison.name} ({settings})",
            f"  {'':{width}}   best ms  median ms   GB/s  of copy  against torch  state bytes per parameter",
        ]
        lines += [
            f"  {row['side']:{width}}  {1e3 * row['best_s']:8.2f}  {1e3 * row['median_s']:9.2f}  {row['gb_per_s']:5.1f}"
            f"  {100 * row['share_of_copy']:6.0f}%  {row['faster_than_torch']:12.2f}x  "
            f"{row['state_bytes_per_parameter']:8.2f}  {row['kernel']}".rstrip()
            for row in rows
        ]
        ratio = one.comparison.ratio(TORCH)
        lines.append(
            f"  {one.comparison.ours} against {TORCH}: {ratio.best:.2f}x best, {ratio.median:.2f}x median, "
            f"{ratio.rounds:.2f}x by rounds"
        )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def write(folder: Path, name: str, found: Sequence[Measured], on: Mapping[str, object]) -> list[Path]:
    """Write NAME.json (everything) and NAME.csv (one line per optimizer) into ``folder``; returns the two paths."""
    cases = [as_dict(one) for one in found]
    lines = [
        [case["name"], row["side"], *(row[column] for column in COLUMNS)] for case in cases for row in case["sides"]
    ]
    return report.store(folder, name, {"machine": on, "cases": cases}, ("case", "side", *COLUMNS), lines)
