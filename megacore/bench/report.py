"""How a comparison is shown and kept: a table for the reader, JSON and CSV for the next comparison."""

import csv
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from os import cpu_count
from pathlib import Path
from typing import Any

from megacore.bench.harness import Comparison

REPORTED_PACKAGES = ("torch", "numpy", "transformers", "sentencepiece", "tokenizers", "megatron-core")


def machine() -> dict[str, object]:
    """What a figure cannot be read without: processor, cores, versions, the code's commit, the date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": cpu_count(),
        "python": platform.python_version(),
        "versions": dict(installed_versions()),
    }


def installed_versions() -> list[tuple[str, str]]:
    """(package, version) of the packages that benchmarks touch, where they are installed."""
    found = []
    for package in REPORTED_PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The processor's name; Linux keeps it in /proc, elsewhere Python's guess has to do."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout that this code lies in, with -dirty; "unknown" for an installed package."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data; times in seconds, ratios above 1 where ours is faster."""
    return {
        "name": comparison.name,
        "ours": comparison.ours,
        "settings": dict(comparison.settings),
        "sides": [
            {
                "side": side.name,
                "rounds": len(side.seconds),
                "best_s": side.best,
                "first_quartile_s": side.quartiles[0],
                "median_s": side.median,
                "third_quartile_s": side.quartiles[1],
            }
            for side in comparison.sides
        ],
        "ratios": {
            baseline: {
                "best": ratio.best,
                "median": ratio.median,
                "rounds": ratio.rounds,
                "rounds_quartiles": list(ratio.rounds_quartiles),
            }
            for baseline, ratio in comparison.ratios().items()
        },
    }


def table(comparisons: Sequence[Comparison]) -> str:
    """Text for the terminal, one block per comparison."""
    blocks = []
    for one in comparisons:
        width = max(len(side.name) for side in one.sides)
        settings = ", ".join(f"{name} {value}" for name, value in one.settings.items())
        ratios = one.ratios()
        lines = [
            f"{one.name} ({settings})",
            f"  {'':{width}}   best ms  quartiles ms            {one.ours} is faster by",
        ]
        for side in one.sides:
            quartiles = " ".join(f"{1e3 * value:7.2f}" for value in (side.quartiles[0], side.median, side.quartiles[1]))
            line = f"  {side.name:{width}}  {1e3 * side.best:8.2f}  {quartiles}"
            if side.name in ratios:
                ratio = ratios[side.name]
                line += f"   {ratio.best:.2f}x best, {ratio.median:.2f}x median, {ratio.rounds:.2f}x by rounds"
            lines.append(line)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def write(folder: Path, name: str, comparisons: Sequence[Comparison], on: Mapping[str, object]) -> list[Path]:
    """Write NAME.json (everything) and NAME.csv (one line per side) into `folder`; returns the two paths."""
    rows = [as_dict(one) for one in comparisons]
    columns = ("benchmark", "side", "rounds", "best_s", "first_quartile_s", "median_s", "third_quartile_s")
    ratios = ("ours_faster_best", "ours_faster_median", "ours_faster_rounds")
    lines = []
    for row in rows:
        for side in row["sides"]:
            ratio = row["ratios"].get(side["side"])
            values = [ratio[key] for key in ("best", "median", "rounds")] if ratio else ["", "", ""]
            lines.append([row["name"], *(side[column] for column in columns[1:]), *values])
    return store(folder, name, {"machine": on, "comparisons": rows}, (*columns, *ratios), lines)


def store(
    folder: Path, name: str, everything: Mapping[str, object], columns: Sequence[str], lines: Sequence[Sequence[object]]
) -> list[Path]:
    """Write NAME.json and NAME.csv into `folder`, which is made if need be; returns the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = folder / f"{name}.json", folder / f"{name}.csv"
    as_json.write_text(json.dumps(everything, indent=1) + "\n")
    with as_csv.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *lines])
    return [as_json, as_csv]
