"""One timeline on a sheet: a row per rank, the axis of time below, live activations and idle shares at the right."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.cost.plot.boxes import Boxes, Floats, boxes_of, marks_of, num_chunks, shares
from megacore.cost.plot.colours import GREY, HUES, IDLE, INK, LINE, MARKS, NAMES, PAPER, ink_on, shade
from megacore.cost.plot.sheet import DIGIT, Sheet
from megacore.cost.plot.words import idle_shares
from megacore.cost.timeline import Timeline
from megacore.schedule.instruction import Op
from megacore.schedule.live import peak_activations

# Points.
HEAD, FOOT = 16.0, 30.0
COLUMN, LABEL, GUTTER = 66.0, 30.0, 16.0
NARROWEST_BOX = 0.7
BIN = 4.0
SMALLEST_DIGITS, LARGEST_DIGITS, ROOM = 4.5, 7.5, 1.6


@dataclass(frozen=True)
class Panel:
    """A timeline and what follows from it alone. name: "predicted", "measured" or nothing."""

    timeline: Timeline
    name: str

    @cached_property
    def boxes(self) -> Boxes:
        """All computing."""
        return boxes_of(self.timeline)

    @cached_property
    def marks(self) -> Boxes:
        """Reductions and optimizer steps."""
        return marks_of(self.timeline)

    @cached_property
    def span(self) -> float:
        """From the first computation's start to the end of everything drawn."""
        return max((float(each.end.max()) for each in (self.boxes, self.marks) if len(each)), default=0.0)

    @cached_property
    def usual(self) -> float:
        """How long a box usually is, at the short end: three in four are longer."""
        return float(np.quantile(self.boxes.long, 0.25)) if len(self.boxes) else 0.0

    def merged(self, scale: float) -> bool:
        """Whether boxes are too narrow to be drawn one by one, ``scale`` points being a unit of time."""
        return self.usual * scale < NARROWEST_BOX

    @property
    def num_ranks(self) -> int:
        """Rows."""
        return len(self.timeline.start)

    @property
    def row(self) -> float:
        """Points from a row to the next: generous for a few ranks, a fixed page for many."""
        return min(24.0, max(7.0, round(420 / max(1, self.num_ranks), 1)))

    @property
    def height(self) -> float:
        """Points."""
        return HEAD + self.num_ranks * self.row + FOOT


@dataclass(frozen=True)
class Frame:
    """Where a panel's rows are on the sheet, in points, and how time becomes points."""

    left: float
    top: float
    width: float
    scale: float
    row: float

    @property
    def bar(self) -> float:
        """Height of a row's boxes: what is left is the gap."""
        return self.row - max(1.0, 0.12 * self.row)

    def x(self, time: Floats) -> Floats:
        """Of times."""
        return self.left + time * self.scale

    def y(self, rank: NDArray[Any], share: Floats | float) -> Floats:
        """Of a share (0: top, 1: bottom) of the rows' bars."""
        return self.top + rank * self.row + share * self.bar


def draw_panel(sheet: Sheet, panel: Panel, frame: Frame, note: str, live: bool) -> None:
    """note: what to say beside the panel's name, in grey. live: whether to add the column of live activations."""
    head = frame.top - 6
    sheet.text(frame.left - 6, head, "rank", 8, GREY, ha="right")
    sheet.text(frame.left, head, panel.name, 9, fontweight="bold")
    sheet.text(frame.left + (sheet.width_of(panel.name, 9) + 12 if panel.name else 0), head, note, 8, GREY)
    ranks = np.arange(panel.num_ranks)
    right = frame.left + panel.timeline.makespan * frame.scale
    sheet.boxes((frame.left, right), (frame.y(ranks, 0.0), frame.y(ranks, 1.0)), IDLE, name="ground")
    for rank in ranks.tolist():
        _label(sheet, frame, rank, frame.left - 6, str(rank), GREY, ha="right")
    if panel.merged(frame.scale):
        _draw_shares(sheet, panel, frame)
    else:
        _draw_boxes(sheet, panel, frame)
        _draw_numbers(sheet, panel, frame)
    _draw_marks(sheet, panel, frame)
    _draw_columns(sheet, panel, frame, live)


def _draw_boxes(sheet: Sheet, panel: Panel, frame: Frame) -> None:
    usual, chunks = panel.usual * frame.scale, num_chunks(panel.timeline.schedule)
    line = 0.7 if usual > 7 else 0.4 if usual > 2.5 else 0.0
    for op in HUES:
        for chunk in range(chunks):
            boxes = panel.boxes.where((panel.boxes.op == op) & (panel.boxes.chunk == chunk))
            x = frame.x(boxes.start), frame.x(boxes.end)
            y = frame.y(boxes.rank, boxes.top), frame.y(boxes.rank, boxes.bottom)
            sheet.boxes(x, y, shade(op, chunk, chunks), edge=PAPER, line=line, name=f"{NAMES[op]} {chunk}")


def _draw_numbers(sheet: Sheet, panel: Panel, frame: Frame) -> None:
    """The microbatch in each box with room for the longest number: not for some of a row and not for others."""
    boxes, chunks = panel.boxes, num_chunks(panel.timeline.schedule)
    if not len(boxes):
        return
    ems = len(str(boxes.microbatch.max())) * DIGIT
    lowest = float((boxes.bottom - boxes.top).min()) * frame.bar
    size = min(LARGEST_DIGITS, 0.95 * lowest, max(SMALLEST_DIGITS, (panel.usual * frame.scale - ROOM) / ems))
    room = boxes.long * frame.scale * (1 + 1e-9) >= ems * size + ROOM
    if size < SMALLEST_DIGITS:
        return
    inks = np.array([[ink_on(shade(op, chunk, chunks)) == PAPER for chunk in range(chunks)] for op in HUES])
    white = inks[np.searchsorted(list(HUES), boxes.op), boxes.chunk]
    x = frame.x((boxes.start + boxes.end) / 2)
    y = frame.y(boxes.rank, (boxes.top + boxes.bottom) / 2)
    for ink, inked in ((PAPER, white), (INK, ~white)):
        for microbatch in np.unique(boxes.microbatch[room & inked]).tolist():
            chosen = room & inked & (boxes.microbatch == microbatch)
            sheet.stamps(str(microbatch), x[chosen], y[chosen], size, ink, f"microbatch {microbatch}")


def _draw_shares(sheet: Sheet, panel: Panel, frame: Frame) -> None:
    """Where boxes would be thinner than a line: of each few points of time, how much went where, stacked."""
    edges = np.linspace(0.0, panel.timeline.makespan, max(2, round(panel.timeline.makespan * frame.scale / BIN)) + 1)
    x = frame.x(np.concatenate([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]]))
    for rank in range(panel.num_ranks):
        own = panel.boxes.where(panel.boxes.rank == rank)
        low = np.ones(len(x))
        for op in reversed(tuple(HUES)):
            share = shares(own.where(own.op == op), edges)
            high = low - np.concatenate([share[:1], share, share[-1:]])
            if share.any():
                y = frame.y(np.array(rank), high), frame.y(np.array(rank), low)
                sheet.band(x, y, shade(op), name=f"{NAMES[op]} shares")
            low = high


def _draw_marks(sheet: Sheet, panel: Panel, frame: Frame) -> None:
    """Reductions at the foot of a row, the optimizer's step over its whole height; each is wide enough to be seen."""
    for op in MARKS:
        marks = panel.marks.where(panel.marks.op == op)
        left = frame.x(marks.start)
        x = left, np.maximum(frame.x(marks.end), left + 2.0)
        y = frame.y(marks.rank, 0.0 if op == Op.OPTIMIZE else 0.72), frame.y(marks.rank, 1.0)
        sheet.boxes(x, y, MARKS[op], edge=PAPER, line=0.3 if frame.row > 12 else 0.0, name=NAMES[op])


def _draw_columns(sheet: Sheet, panel: Panel, frame: Frame, live: bool) -> None:
    left = frame.left + frame.width + GUTTER
    idle = np.array(idle_shares(panel.timeline))
    between = np.array(panel.timeline.rank_idle) / (panel.timeline.makespan or 1.0)
    most = max(float(idle.max()), 0.1)
    labels = [f"{share:.1%}" for share in idle.tolist()]
    _draw_column(sheet, frame, left, "idle", [(idle / most, LINE), (between / most, GREY)], labels)
    if live:
        left += COLUMN + GUTTER
        counts = np.array(peak_activations(panel.timeline.schedule))
        labels = [f"{count:.4g}" for count in counts.tolist()]
        _draw_column(sheet, frame, left, "live at peak", [(counts / max(counts.max(), 1.0), GREY)], labels)


def _draw_column(
    sheet: Sheet, frame: Frame, left: float, title: str, bars: list[tuple[Floats, str]], labels: list[str]
) -> None:
    """Of each rank bars one upon the other, the first being the longest (1 fills the column), and a text behind."""
    sheet.text(left, frame.top - 6, title, 8, GREY)
    ranks, room = np.arange(len(labels)), COLUMN - LABEL
    for share, colour in bars:
        sheet.boxes((left, left + room * share), (frame.y(ranks, 0.2), frame.y(ranks, 0.8)), colour, name=title)
    for rank, (share, label) in enumerate(zip(bars[0][0].tolist(), labels, strict=True)):
        _label(sheet, frame, rank, left + room * share + 4, label, INK)


def _label(sheet: Sheet, frame: Frame, rank: int, x: float, text: str, colour: str, **style: str) -> None:
    """A text on the middle of a rank's row. Rows too low for that leave some out."""
    if rank % max(1, round(6.3 / frame.row + 0.3)):
        return
    y = frame.top + rank * frame.row + frame.bar / 2
    sheet.text(x, y, text, min(7.5, max(5.0, 0.8 * frame.row)), colour, va="center_baseline", **style)
