"""How the best plan grows with the number of devices: speed of each against that of the fewest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megacore.cost.plot.colours import GREY, INK, LINE
from megacore.cost.plot.svg import Svg

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860.0, 300.0, 64.0, 150.0, 34.0, 52.0
BLUE = "#2457b8"


@dataclass(frozen=True)
class Point:
    """The best plan of a number of devices; ``tokens`` a second of each."""

    gpus: int
    tokens: float
    name: str


def scaling_curve(points: Sequence[Point], chosen: int) -> str:
    """An SVG picture: the share of the best speed of a device, over the number of devices; ``chosen`` is marked."""
    svg = Svg(WIDTH, HEIGHT, "Scaling efficiency")
    if not points:
        svg.text(LEFT, TOP, "nothing fits on any number of devices", 12, GREY)
        return svg.markup()
    best = max(point.tokens for point in points)
    low, high = math.log2(points[0].gpus), math.log2(points[-1].gpus)

    def place(point: Point) -> tuple[float, float]:
        along = (math.log2(point.gpus) - low) / (high - low) if high > low else 0.5
        return LEFT + along * (WIDTH - LEFT - RIGHT), _y(point.tokens / best)

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        svg.line([(LEFT, _y(share)), (WIDTH - RIGHT, _y(share))], LINE, 0.8, "" if share in (0, 1) else "3 3")
        svg.text(LEFT - 8, _y(share) + 4, f"{share:.0%}", 11, GREY, "end")
    svg.text(LEFT, 16, f"speed of a device, of {best:,.0f} tokens/s at best", 11, GREY)
    svg.line([place(point) for point in points], BLUE, 2.2)
    for point in points:
        x, y = place(point)
        tip = f"{point.gpus} devices: {point.tokens:,.0f} tokens/s each, {point.tokens / best:.1%}; {point.name}"
        svg.dot(x, y, 6 if point.gpus == chosen else 4, "#a8341a" if point.gpus == chosen else BLUE, tip)
        svg.text(x, HEIGHT - BOTTOM + 20, f"{point.gpus:,}", 11, INK, "middle", bold=point.gpus == chosen)
        svg.text(x, y - 10, f"{point.tokens / best:.0%}", 10.5, INK, "middle")
    svg.text(WIDTH - RIGHT, HEIGHT - 14, "devices", 11, GREY, "end")
    return svg.markup()


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
