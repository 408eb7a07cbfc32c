"""A pipeline's timeline for a terminal or a log: a line per rank, time to the right."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from types import MappingProxyType

import numpy as np

from megacore.cost.plot.boxes import Boxes, boxes_of, num_chunks, shares
from megacore.cost.plot.colours import HUES, NAMES
from megacore.cost.plot.words import figures_of, idle_shares, number, shape_of
from megacore.cost.timeline import Timeline
from megacore.schedule.instruction import Op
from megacore.schedule.live import peak_activations

Paint = Callable[..., str]
"""paint(text, *styles) -> the text with escape codes. The styles here: blue red yellow magenta dim."""
Segment = tuple[str, tuple[str, ...]]
"""A text and its styles."""

LETTERS: Mapping[Op, str] = MappingProxyType(
    {Op.FORWARD: "F", Op.BACKWARD: "B", Op.INPUT_GRAD: "I", Op.WEIGHT_GRAD: "W"}
)
STYLES: Mapping[Op, str] = MappingProxyType(
    {Op.FORWARD: "blue", Op.BACKWARD: "red", Op.INPUT_GRAD: "yellow", Op.WEIGHT_GRAD: "magenta"}
)
IDLE, REST, LINE, BOTH = "·", "-", "━", "&"
"""Idle; what fills a box behind its letters; a coloured box; a pair with one column only."""
FIGURES = 60
"""Columns from which on there is room for each rank's idle share and live activations."""


def terminal_picture(timeline: Timeline, width: int, paint: Paint | None) -> list[str]:
    """Lines of at most ``width`` columns: a title, a line per rank, a legend.

    Without ``paint`` letters say what runs, so that a log can be read; with it colours do. Boxes bear their
    microbatch where there is room. Boxes narrower than a column are not told apart: then a column shows one of the
    things that ran in it, such that over a line each takes as many columns as it took time.
    """
    boxes, chunks = boxes_of(timeline), num_chunks(timeline.schedule)
    ranks = len(timeline.start)
    left = max(4, len(str(ranks - 1)))
    right = _figures(timeline) if width >= FIGURES else [""] * (ranks + 1)
    columns = max(1, width - left - 1 - max(map(len, right)))
    usual = float(np.quantile(boxes.long, 0.25)) if len(boxes) else 0.0
    scale = columns / (timeline.makespan or 1.0)
    apart = usual * scale >= 1
    if apart:
        scale = np.floor(usual * scale) / usual  # so that a schedule of equal boxes looks like one
        columns = int(np.floor(timeline.makespan * scale + 0.5))
    lines = textwrap.wrap(f"{shape_of(timeline.schedule)}, {figures_of(timeline)}", width)
    lines.append(_painted([(f"{'rank':>{left}} " + " " * columns + right[0], ("dim",))], paint).rstrip())
    for rank in range(ranks):
        own = boxes.where(boxes.rank == rank)
        segments = (_boxes if apart else _mixture)(own, scale, columns, paint is not None)
        lines.append(f"{rank:>{left}} " + _painted(segments, paint) + right[rank + 1])
    return lines + _legend(boxes, chunks, 1 / scale, apart, width, paint)


def _boxes(own: Boxes, scale: float, columns: int, coloured: bool) -> Iterator[Segment]:
    first = np.floor(own.start * scale + 0.5).astype(int).tolist()
    last = np.floor(own.end * scale + 0.5).astype(int).tolist()
    ops, chunks, microbatches = [Op(code) for code in own.op.tolist()], own.chunk.tolist(), own.microbatch.tolist()
    used = 0
    for place, (begin, end, top, bottom) in enumerate(zip(first, last, own.top.tolist(), own.bottom.tolist())):
        if top > 0:
            continue  # the back half of a pair, written with its front half
        begin = max(begin, used)  # clocks of measured timelines may overlap by a little
        yield IDLE * (begin - used), ("dim",)
        used = max(begin, end)
        things = [(ops[i], chunks[i], microbatches[i]) for i in ((place,) if bottom == 1 else (place, place + 1))]
        yield from (_colours if coloured else _letters)(things, used - begin)
    yield IDLE * (columns - used), ("dim",)


def _letters(things: list[tuple[Op, int, int]], room: int) -> Iterator[Segment]:
    """``F0``, ``F0--``, ``F``, ``F7B3--``, ``FB``, whichever fits; lower case for odd chunks."""
    letters = [LETTERS[op].lower() if chunk % 2 else LETTERS[op] for op, chunk, _ in things]
    full = "".join(f"{letter}{thing[-1]}" for letter, thing in zip(letters, things, strict=True))
    text = next((text for text in (full, "".join(letters), BOTH) if len(text) <= room), "")
    yield text + REST * (room - len(text)), ()


def _colours(things: list[tuple[Op, int, int]], room: int) -> Iterator[Segment]:
    """The microbatch and a line, dim for odd chunks; of a pair the front half, then the back half."""
    for place, (op, chunk, microbatch) in enumerate(things):
        part = room * (place + 1) // len(things) - room * place // len(things)
        text = str(microbatch) if len(str(microbatch)) <= part else ""
        yield text + LINE * (part - len(text)), (STYLES[op], *(("dim",) if chunk % 2 else ()))


def _mixture(own: Boxes, scale: float, columns: int, coloured: bool) -> Iterator[Segment]:
    """Each column shows what was so far shown least for its time, of all that ran there."""
    edges = np.arange(columns + 1) / scale
    kinds = [op for op in HUES if (own.op == op).any()]
    took = np.stack([shares(own.where(own.op == op), edges) for op in kinds] or [np.zeros(columns)])
    owed = np.zeros(len(took) + 1)
    for share in np.concatenate([took, 1 - took.sum(axis=0, keepdims=True)]).T:
        owed += share
        shown = int(np.argmax(np.where(share > 1e-9, owed, -np.inf)))
        owed[shown] -= 1
        if shown == len(took) or not kinds:
            yield IDLE, ("dim",)
        else:
            yield LINE if coloured else LETTERS[kinds[shown]], (STYLES[kinds[shown]],)


def _painted(segments: Iterable[Segment], paint: Paint | None) -> str:
    """Neighbours of one style are painted together."""
    runs = groupby((segment for segment in segments if segment[0]), key=lambda segment: segment[1])
    texts = (("".join(text for text, _ in run), styles) for styles, run in runs)
    return "".join(paint(text, *styles) if paint else text for text, styles in texts)


def _figures(timeline: Timeline) -> list[str]:
    """The columns at the right: their heads, then those of each rank."""
    idle = [f"{share:.1%}" for share in idle_shares(timeline)]
    if not timeline.schedule.trains:
        return ["   idle", *(f"{share:>7}" for share in idle)]
    live = [f"{count:.4g}" for count in peak_activations(timeline.schedule)]
    return ["   idle   live", *(f"{share:>7}{count:>7}" for share, count in zip(idle, live, strict=True))]


def _legend(boxes: Boxes, chunks: int, column: float, apart: bool, width: int, paint: Paint | None) -> list[str]:
    ops = [op for op in HUES if (boxes.op == op).any()]
    items: list[list[Segment]] = [
        [((LINE * 2 if paint else LETTERS[op]), (STYLES[op],)), (f" {NAMES[op]}", ())] for op in ops
    ]
    items.append([(f"{IDLE} idle", ())])
    if apart and chunks > 1:
        items.append([(f"{'dim' if paint else 'lower case'}: odd chunks", ())])
    items.append([(f"a column is {number(column)} of time", ())])
    if not apart:
        items.append([("showing in turn what ran in it", ())])
    lines, used = [""], 0
    for item in items:
        long = sum(len(text) for text, _ in item) + 2
        if used and used + long > width:
            lines.append("")
            used = 0
        lines[-1] += _painted(item, paint) + "  "
        used += long
    return [line.rstrip() for line in lines]
