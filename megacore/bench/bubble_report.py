"""How bubbles are shown and kept: a table for the reader, JSON and CSV for the next comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megacore.bench.bubble import Bubble
from megacore.bench.report import store

COLUMNS = ("predicted", "p2p_s", "first_quartile", "median", "third_quartile", "error")


def as_dict(bubble: Bubble) -> dict[str, Any]:
    """The bubble as plain data; shares of all ranks' time, and the error as a share of the prediction."""
    first, third = bubble.quartiles
    return {
        "name": bubble.name,
        "settings": dict(bubble.settings),
        "rounds": len(bubble.measured),
        "predicted": bubble.predicted,
        "p2p_s": bubble.p2p_s,
        "first_quartile": first,
        "median": bubble.median,
        "third_quartile": third,
        "error": bubble.error,
    }


def table(bubbles: Sequence[Bubble]) -> str:
    """Text for the terminal: one line per pipeline."""
    width = max(len(one.name) for one in bubbles)
    settings = ", ".join(f"{name} {value:g}" for name, value in _common(bubbles).items())
    lines = [
        f"bubble, % of all ranks' time ({settings})",
        f"{'':{width}}  message  predicted  measured quartiles    off by",
    ]
    for one in bubbles:
        first, third = one.quartiles
        measured = " ".join(f"{100 * value:6.2f}" for value in (first, one.median, third))
        message = f"{1000 * one.p2p_s:.2f} ms"
        lines.append(f"{one.name:{width}}  {message}  {100 * one.predicted:9.2f}  {measured}  {100 * one.error:+6.1f}%")
    return "\n".join(lines)


def write(folder: Path, name: str, bubbles: Sequence[Bubble], on: Mapping[str, object]) -> list[Path]:
    """Write NAME.json (everything) and NAME.csv (one line per pipeline) into ``folder``; returns the two paths."""
    rows = [as_dict(one) for one in bubbles]
    lines = [[row["name"], row["rounds"], *(row[column] for column in COLUMNS)] for row in rows]
    return store(folder, name, {"machine": on, "bubbles": rows}, ("pipeline", "rounds", *COLUMNS), lines)


def _common(bubbles: Sequence[Bubble]) -> dict[str, object]:
    """The settings that are the same for all."""
    first, *others = (dict(one.settings) for one in bubbles)
    return {name: value for name, value in first.items() if all(other[name] == value for other in others)}
