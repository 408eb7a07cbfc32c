"""Pictures as SVG text, without any library: what a page can hold inside itself.

Sizes are pixels from the upper left corner. The same picture has the same bytes.
"""

from collections.abc import Sequence
from html import escape

from megacore.cost.plot.colours import GREY, INK, LINE, PAPER

FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
EM = 0.56
"""Usual width of a letter, in font sizes: for what must fit."""


class Svg:
    """A drawing of ``width`` x ``height`` pixels; ``title`` is read aloud where it cannot be seen."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height = width, height
        self._parts = [f"<title>{escape(title)}</title>"]

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, tip: str = "", **style: str | float
    ) -> None:
        """A rectangle; ``tip`` is shown where the mouse rests on it. Style names have _ for -."""
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(max(height, 0))}" fill="{fill}"'
            f"{_style(style)}>{inner}</rect>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 11,
        fill: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """One line, its base line at ``y``; anchor: start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" fill="{fill}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>"
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str = LINE, width: float = 1, dash: str = "") -> None:
        """A line through points."""
        way = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="{_n(width)}"{dashes}/>'
        )

    def dot(self, x: float, y: float, radius: float, fill: str, tip: str = "") -> None:
        """A filled circle."""
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        self._parts.append(
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{fill}" stroke="{PAPER}">{inner}</circle>'
        )

    def hatch(self, name: str, colour: str = GREY) -> str:
        """A fill of slanting lines; ``name`` must be unique in the page."""
        self._parts.append(
            f'<defs><pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate(45)"><rect width="6" height="6" fill="#f4f5f7"/>'
            f'<line x1="0" y1="0" x2="0" y2="6" stroke="{colour}" stroke-width="1.6"/></pattern></defs>'
        )
        return f"url(#{name})"

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
        """(colour, meaning) in one line."""
        for colour, meaning in entries:
            self.rect(x, y - 9, 10, 10, colour, rx=2)
            self.text(x + 14, y, meaning, 11, GREY)
            x += 14 + len(meaning) * 11 * EM + 16

    def markup(self) -> str:
        """The whole picture as text; also what belongs into a .svg file."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(self.width)} {_n(self.height)}" '
            f'width="{_n(self.width)}" height="{_n(self.height)}" role="img" font-family="{FONT}">'
            f"{''.join(self._parts)}</svg>"
        )


def blend(low: str, high: str, share: float) -> str:
    """The colour at ``share`` (0 to 1) of the way between two (#rrggbb)."""
    ends = [tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5)) for colour in (low, high)]
    return "#" + "".join(f"{round(a + min(1.0, max(0.0, share)) * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def _n(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")


def _style(style: dict[str, str | float]) -> str:
    return "".join(
        f' {name.replace("_", "-")}="{_n(value) if isinstance(value, (int, float)) else value}"'
        for name, value in style.items()
    )
