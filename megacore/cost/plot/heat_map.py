"""The best step of every pair of tensor- and pipeline-parallel sizes; what does not fit is hatched."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megacore.cost.plot.colours import GREY, INK, PAPER, ink_on
from megacore.cost.plot.svg import Svg, blend

FAST, SLOW = "#2457b8", "#e4edfb"
CELL, HIGH, LEFT, TOP = 104.0, 50.0, 70.0, 46.0


@dataclass(frozen=True)
class Cell:
    """``seconds`` and ``tokens`` (a second and device) of the best layout, 0 where there is none, for which ``why``
    says the reason; ``name`` is the layout."""

    seconds: float
    tokens: float
    name: str = ""
    why: str = ""


def heat_map(cells: Mapping[tuple[int, int], Cell]) -> str:
    """An SVG picture of (tp, pp) -> cell, darker where faster; the best has a frame."""
    tps, pps = sorted({tp for tp, _ in cells}), sorted({pp for _, pp in cells})
    svg = Svg(LEFT + CELL * len(pps) + 20, TOP + HIGH * len(tps) + 44, "Best step time of each tp and pp")
    empty = svg.hatch("does-not-fit")
    rates = [cell.tokens for cell in cells.values() if cell.tokens]
    best, worst = max(rates, default=1.0), min(rates, default=0.0)
    svg.text(LEFT, 16, "pipeline parallel size", 11, GREY)
    svg.text(8, TOP - 8, "tensor", 11, GREY)
    for column, pp in enumerate(pps):
        svg.text(LEFT + (column + 0.5) * CELL, TOP - 8, f"pp {pp}", 12, INK, "middle", bold=True)
    for line, tp in enumerate(tps):
        y = TOP + line * HIGH
        svg.text(LEFT - 10, y + HIGH / 2 + 4, f"tp {tp}", 12, INK, "end", bold=True)
        for column, pp in enumerate(pps):
            x, cell = LEFT + column * CELL, cells.get((tp, pp), Cell(0, 0, "", "not legal"))
            if not cell.tokens:
                svg.rect(x + 1.5, y + 1.5, CELL - 3, HIGH - 3, empty, cell.why, rx=4)
                _plate(svg, x, y, cell.why)
                continue
            colour = blend(SLOW, FAST, (cell.tokens - worst) / (best - worst) if best > worst else 1.0)
            frame: dict[str, Any] = {"stroke": INK, "stroke_width": 2.5} if cell.tokens == best else {}
            svg.rect(x + 1.5, y + 1.5, CELL - 3, HIGH - 3, colour, cell.name, rx=4, **frame)
            ink = ink_on(colour)
            svg.text(x + CELL / 2, y + 21, f"{cell.seconds:.3g} s", 13, ink, "middle", bold=True)
            svg.text(x + CELL / 2, y + 38, f"{cell.tokens:,.0f} tok/s", 10.5, ink, "middle")
    bottom = TOP + HIGH * len(tps) + 24
    svg.legend(LEFT, bottom, [(FAST, "fastest"), (SLOW, "slowest"), (empty, "does not fit, or is not legal")])
    return svg.markup()


def _plate(svg: Svg, x: float, y: float, why: str) -> None:
    """A short reason on a hatched cell."""
    svg.rect(x + 12, y + HIGH / 2 - 10, CELL - 24, 20, PAPER, why, rx=3)
    svg.text(x + CELL / 2, y + HIGH / 2 + 4, why if len(why) <= 14 else f"{why[:13]}…", 10.5, GREY, "middle")
