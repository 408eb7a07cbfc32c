"""A pipeline's timeline as a picture for the screen or for print: svg or png, predicted above measured if both are."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megacore.cost.plot.boxes import num_chunks
from megacore.cost.plot.colours import GREY, HUES, IDLE, LINE, MARKS, NAMES, shade
from megacore.cost.plot.panel import COLUMN, GUTTER, HEAD, LARGEST_DIGITS, Frame, Panel, draw_panel
from megacore.cost.plot.sheet import DIGIT, Sheet
from megacore.cost.plot.words import figures_of, number, shape_of
from megacore.cost.timeline import Timeline
from megacore.schedule.instruction import Op

# Points.
MARGIN, RANKS = 20.0, 24.0
NARROWEST, WIDEST = 440.0, 960.0
SWATCH, LEGEND_LINE = 9.0, 15.0

IDLE_NOTE = "idle: share of the makespan, dark between the rank's own first and last work"
LIVE_NOTE = "; live at peak: microbatches whose activations the rank holds"


def save_picture(
    path: Path, predicted: Timeline | None, measured: Timeline | None = None, title: str | None = None
) -> None:
    """Draws timelines into an .svg or .png file; needs the `plots` extra (matplotlib).

    Given both, they share one axis of time, so both must be in seconds; a measured timeline always is. A row is a rank,
    a box a computation with its microbatch's number, light ground idle time; messages are not drawn. The columns at the
    right hold idle time as a share of the makespan, of which the dark part lies between the rank's own first and last
    work, and the most activations alive at once, in microbatches of all of the rank's layers.
    Raises ValueError for another suffix, without matplotlib, or without a timeline.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path.name!r} is not a picture that can be drawn; let its name end in .svg or .png")
    named = {"predicted": predicted, "measured": measured}
    given = {name: timeline for name, timeline in named.items() if timeline is not None}
    if not given:
        raise ValueError("there is no timeline to draw; give a predicted one, a measured one, or both")
    panels = [Panel(timeline, name if len(given) > 1 else "") for name, timeline in given.items()]
    unit, factor = _unit(max(panel.span for panel in panels)) if measured is not None else ("", 1.0)
    _draw(panels, title, unit, factor).save(path)


def _draw(panels: list[Panel], title: str | None, unit: str, factor: float) -> Sheet:
    span = max(panel.span for panel in panels) or 1.0
    width = _width_of_axis(panels, span)
    left = MARGIN + RANKS
    schedule = panels[0].timeline.schedule
    full = left + width + (1 + schedule.trains) * (GUTTER + COLUMN) + MARGIN
    shape = shape_of(schedule)
    heading = title or shape
    notes = [_figures(panel, unit, factor, width / span) for panel in panels]
    subtitles = ([shape] if title else []) + (notes if len(panels) == 1 else [])

    legend_top = MARGIN + (36 if subtitles else 18)
    legend = list(_lines_of_legend(panels, width / span, full - 2 * MARGIN))
    top = legend_top + LEGEND_LINE * len(legend) + 8
    sheet = Sheet(full, top + sum(panel.height for panel in panels) + MARGIN)
    room = (full - 2 * MARGIN) / (1.2 * sheet.width_of(heading, 1.0))  # bold is wider
    sheet.text(MARGIN, MARGIN + 10, heading, min(12.5, room), fontweight="bold")
    sheet.text(MARGIN, MARGIN + 26, "   ".join(subtitles), 9, GREY)
    for line, items in enumerate(legend):
        _draw_legend(sheet, items, legend_top + LEGEND_LINE * line)
    for panel, note in zip(panels, notes, strict=True):
        frame = Frame(left, top + HEAD, width, width / span, panel.row)
        live = panel is panels[0] and schedule.trains  # follows from the schedule: said once, above
        draw_panel(sheet, panel, frame, note if len(panels) > 1 else "", live)
        top += panel.height
        _draw_axis(sheet, frame, frame.top + panel.num_ranks * panel.row, span, unit, factor)
    sheet.text(left, top + 4, IDLE_NOTE + LIVE_NOTE * schedule.trains, 7, GREY)
    return sheet


def _width_of_axis(panels: list[Panel], span: float) -> float:
    """Wide enough for numbers in the usual boxes, within what a page takes."""
    usual = min((panel.usual for panel in panels if panel.usual), default=span)
    digits = max(len(str(panel.timeline.schedule.num_microbatches - 1)) for panel in panels)
    return float(np.clip((digits * DIGIT * LARGEST_DIGITS + 2.6) * span / usual, NARROWEST, WIDEST))


def _figures(panel: Panel, unit: str, factor: float, scale: float) -> str:
    text = figures_of(panel.timeline, unit, factor)
    return text + "; too many boxes to tell apart: heights are shares of time" if panel.merged(scale) else text


def _unit(span: float) -> tuple[str, float]:
    """Of seconds: what to call the unit that suits a span, and how many make a second."""
    return ("s", 1.0) if span >= 10 else ("ms", 1e3) if span >= 1e-2 else ("µs", 1e6)


def _draw_axis(sheet: Sheet, frame: Frame, y: float, span: float, unit: str, factor: float) -> None:
    step = _step(span * factor / max(2.0, frame.width / 90))
    ticks = np.arange(0.0, span * factor * (1 + 1e-9), step)
    x = frame.x(ticks / factor)
    sheet.boxes((frame.left, frame.left + frame.width), (y + 1.7, y + 2.3), LINE, name="axis")
    sheet.boxes((x - 0.3, x + 0.3), (y + 2, y + 5), LINE, name="axis")
    for place, tick in zip(x.tolist(), ticks.tolist(), strict=True):
        sheet.text(place, y + 13, number(tick), 7, GREY, ha="center")
    sheet.text(frame.left + frame.width, y + 23, f"time ({unit})" if unit else "time", 7.5, GREY, ha="right")


def _step(least: float) -> float:
    """The round number (1, 2, 5 times a power of ten) at or above ``least``."""
    power = 10.0 ** np.floor(np.log10(least)) if least > 0 else 1.0
    return float(next(round_ * power for round_ in (1, 2, 5, 10) if round_ * power >= least * (1 - 1e-9)))


LegendItem = tuple[tuple[str, ...], bool, str]
"""Colours of the swatches, whether they lie one upon the other (else side by side), what they mean."""


def _lines_of_legend(panels: list[Panel], scale: float, width: float) -> Iterator[list[LegendItem]]:
    """What the panels have, in lines of at most ``width`` points."""
    met = {Op(code) for panel in panels for each in (panel.boxes, panel.marks) for code in np.unique(each.op).tolist()}
    chunks = max(1 if panel.merged(scale) else num_chunks(panel.timeline.schedule) for panel in panels)
    items: list[LegendItem] = [
        (tuple(shade(op, chunk, chunks) for chunk in range(chunks)), False, NAMES[op]) for op in HUES if op in met
    ]
    if any((panel.boxes.bottom < 1).any() for panel in panels):
        items.append(((shade(Op.FORWARD), shade(Op.BACKWARD)), True, "both at once"))
    items.append(((IDLE,), False, "idle"))
    items += [((MARKS[op],), True, NAMES[op]) for op in MARKS if op in met]
    items += [((), True, f"dark to light: chunks 0 to {chunks - 1}")] * (chunks > 1)
    line: list[LegendItem] = []
    used = 0.0
    for item in items:
        takes = _swatches(item) + 4 + 4.5 * len(item[2]) + 14
        if line and used + takes > width:
            yield line
            line, used = [], 0.0
        line.append(item)
        used += takes
    yield line


def _swatches(item: LegendItem) -> float:
    colours, stacked, _ = item
    return SWATCH * (min(1, len(colours)) if stacked else len(colours))


def _draw_legend(sheet: Sheet, items: list[LegendItem], y: float) -> None:
    x = MARGIN
    for item in items:
        colours, stacked, name = item
        for place, colour in enumerate(colours):
            left = x if stacked else x + place * SWATCH
            low, high = (place / len(colours), (place + 1) / len(colours)) if stacked else (0.0, 1.0)
            sheet.boxes((left, left + SWATCH), (y + low * SWATCH, y + high * SWATCH), colour, name="legend")
        x += _swatches(item) + (4 if colours else 0)
        sheet.text(x, y + SWATCH - 1.5, name, 8, GREY)
        x += sheet.width_of(name, 8) + 14
