"""Loss curves from metrics.jsonl: the numbers to draw, and the drawing for a terminal (braille dots)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megacore.monitor.console import Paint, human_count, plain
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import METRICS

Point = tuple[float, float]
EMPTY = chr(0x2800)  # the braille cell without dots
STYLE_OF = MappingProxyType({"mark": ("green", "bold"), "line": ("cyan",)})


@dataclass(frozen=True)
class Curves:
    """The series of a run as (step, value) points; what is not finite is left out."""

    loss: list[Point]
    val_loss: list[Point]
    lr: list[Point]
    grad_norm: list[Point]
    tokens: int


def read_curves(out: Path) -> Curves:
    """The curves of the run in folder `out`. Raises ValueError if it has no metrics yet."""
    path = out / METRICS
    records = read_json_lines(path) if path.exists() else []
    if not records:
        raise ValueError(f"{path} holds no steps; is {out} the folder of a run that has trained?")
    return curves_of(records)


def curves_of(records: Sequence[dict[str, Any]]) -> Curves:
    """The curves in records of metrics.jsonl; of a step that was logged twice (after a resume) the last counts."""
    last = {record["step"]: record for record in records}

    def series(name: str) -> list[Point]:
        points = [(step, record.get(name)) for step, record in sorted(last.items())]
        return [(float(step), float(value)) for step, value in points if value is not None and math.isfinite(value)]

    tokens = max((record.get("tokens") or 0 for record in records), default=0)
    return Curves(series("loss"), series("val_loss"), series("lr"), series("grad_norm"), tokens)


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The mean over `window` points around each one, so that the smoothed curve does not lag behind.

    At the start, where a loss falls steeply, the window shrinks evenly on both sides; at the end only its right
    side is cut, so that the last value still is a mean.
    """
    values = [value for _, value in points]
    result = []
    for number, (step, _) in enumerate(points):
        reach = min(window // 2, number)
        near = values[number - reach : number + reach + 1]
        result.append((step, sum(near) / len(near)))
    return result


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def terminal_curve(curves: Curves, width: int = 90, height: int = 14, paint: Paint = plain) -> list[str]:
    """The loss over the steps as lines of text, `width` columns wide: braille dots for training, ◆ for validation."""
    points = curves.loss or curves.val_loss
    if not points:
        return ["(no finite loss to draw)"]
    left = 7
    canvas = _Canvas(curves, max(width - left - 1, 10), height)
    canvas.draw_line(smooth(points, len(points) // 40))
    ticks = {canvas.row(value): f"{value:g}" for value in nice_ticks(canvas.low, canvas.high, max(height // 2, 2))}
    marks = {canvas.cell(point) for point in curves.val_loss}
    lines = []
    for row in range(height):
        label, axis = (f"{ticks[row]:>{left - 2}}", " ┤") if row in ticks else (" " * (left - 2), " │")
        lines.append(paint(label, "dim") + paint(axis, "dim") + canvas.render(row, marks, paint))
    lines += [" " * (left - 1) + paint(line, "dim") for line in _x_axis(canvas)]
    return [*lines, "", " " * left + _legend(curves, paint)]


class _Canvas:
    """A grid of braille characters, two dots wide and four high each, over the range of the curves."""

    def __init__(self, curves: Curves, columns: int, rows: int) -> None:
        points = curves.loss + curves.val_loss
        values = [value for _, value in points]
        self.first, self.last = min(step for step, _ in points), max(step for step, _ in points)
        margin = 0.03 * (max(values) - min(values)) or 0.5
        self.low, self.high = min(values) - margin, max(values) + margin
        self.columns, self.rows = columns, rows
        self.dots = [[0] * columns for _ in range(rows)]

    def x(self, step: float) -> int:
        share = (step - self.first) / ((self.last - self.first) or 1.0)
        return round(share * (2 * self.columns - 1))

    def y(self, value: float) -> int:
        return round((self.high - value) / (self.high - self.low) * (4 * self.rows - 1))

    def row(self, value: float) -> int:
        return self.y(value) // 4

    def cell(self, point: Point) -> tuple[int, int]:
        return self.row(point[1]), self.x(point[0]) // 2

    def draw_line(self, points: Sequence[Point]) -> None:
        """Joins the points; where many steps share a column of dots, their mean is drawn."""
        columns: dict[int, list[float]] = {}
        for step, value in points:
            columns.setdefault(self.x(step), []).append(value)
        path = [(x, self.y(sum(values) / len(values))) for x, values in sorted(columns.items())]
        self._dot(*path[0])
        for (x0, y0), (x1, y1) in zip(path, path[1:], strict=False):
            length = max(x1 - x0, abs(y1 - y0))
            for part in range(1, length + 1):
                self._dot(x0 + round((x1 - x0) * part / length), y0 + round((y1 - y0) * part / length))

    def render(self, row: int, marks: set[tuple[int, int]], paint: Paint) -> str:
        marked = {column for mark_row, column in marks if mark_row == row}
        line = ["◆" if column in marked else chr(0x2800 + dots) for column, dots in enumerate(self.dots[row])]
        text = "".join(line).rstrip(EMPTY).replace(EMPTY, " ")
        return "".join(paint(run, *STYLE_OF.get(kind, ())) for kind, run in _runs(text))

    def _dot(self, x: int, y: int) -> None:
        # Unicode numbers the dots of a braille cell down the left column, then the right; the fourth row came later.
        bit = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))[y % 4][x % 2]
        self.dots[y // 4][x // 2] |= bit


def _runs(text: str) -> list[tuple[str, str]]:
    """The text in runs of one kind of character (blank, mark or line), each to be painted at once."""
    kinds = {" ": "blank", "◆": "mark"}
    return [(kind, "".join(run)) for kind, run in groupby(text, key=lambda char: kinds.get(char, "line"))]


def _x_axis(canvas: _Canvas) -> list[str]:
    axis, labels = ["─"] * canvas.columns, [" "] * (canvas.columns + 6)
    free = 0
    for step in nice_ticks(canvas.first, canvas.last, max(canvas.columns // 14, 2)):
        column, text = canvas.x(step) // 2, f"{step:g}"
        start = max(column - len(text) // 2, 0)
        axis[column] = "┬"
        if start >= free and start + len(text) <= len(labels):
            labels[start : start + len(text)] = text
            free = start + len(text) + 2
    return ["└" + "".join(axis), " " + "".join(labels).rstrip()]


def _legend(curves: Curves, paint: Paint) -> str:
    parts = []
    if curves.loss:
        start, end = curves.loss[0][1], smooth(curves.loss, len(curves.loss) // 20)[-1][1]
        parts.append(f"{paint('⠒⠒', 'cyan')} training loss {start:.2f} → {paint(f'{end:.2f}', 'bold')}")
    if curves.val_loss:
        parts.append(f"{paint('◆', 'green', 'bold')} validation {paint(f'{curves.val_loss[-1][1]:.2f}', 'bold')}")
    if curves.tokens:
        parts.append(f"{human_count(curves.tokens)} tokens")
    return "    ".join(parts)
