"""A sheet of paper measured in points, from its upper left corner; the only file here that knows matplotlib."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megacore.cost.plot.boxes import Floats
from megacore.cost.plot.colours import INK, PAPER

DIGIT = 0.6362
"""Width of a digit of the font, in ems."""
FONT = "DejaVu Sans"

Sides = tuple[Floats | float, Floats | float]
"""Where boxes begin and where they end: of each, or the same for all."""


class Sheet:
    """Draws on ``width`` x ``height`` points. Raises ValueError without matplotlib (the `plots` extra)."""

    def __init__(self, width: float, height: float) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError(f'pictures need matplotlib ({error}); run: pip install "megacore[plots]"') from error
        self._figure = Figure(figsize=(width / 72, height / 72), dpi=200, facecolor=PAPER)
        FigureCanvasAgg(self._figure)  # draws without a display and without pyplot's global state
        self._axes: Any = self._figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), frame_on=False)
        self._axes.set_axis_off()
        self._names: Counter[str] = Counter()

    def boxes(self, x: Sides, y: Sides, colour: str, **style: Any) -> None:
        """Rectangles from x[0] to x[1] and y[0] to y[1], of one colour, as one artist.

        style: edge (a colour), line (its width), name (of the svg's group).
        """
        left, right, top, bottom = np.broadcast_arrays(*map(np.atleast_1d, (*x, *y)))
        corners = np.stack([left, top, right, top, right, bottom, left, bottom], axis=-1)
        self._polygons(corners.reshape(-1, 4, 2), colour, style)

    def band(self, x: Floats, y: tuple[Floats, Floats], colour: str, **style: Any) -> None:
        """What lies between two curves over ``x``; style as above."""
        outline = np.stack([np.concatenate([x, x[::-1]]), np.concatenate([y[0], y[1][::-1]])], axis=-1)
        self._polygons(outline[None], colour, style)

    def stamps(self, text: str, x: Floats, y: Floats, size: float, colour: str, name: str) -> None:
        """The same short text at many places, each its middle, as one artist."""
        from matplotlib.collections import PathCollection
        from matplotlib.textpath import TextPath
        from matplotlib.transforms import Affine2D, IdentityTransform

        glyphs = TextPath((0, 0), text, size=size, prop=self._font(size))
        box = glyphs.get_extents()
        middle = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
        stamps = PathCollection(
            [middle.transform_path(glyphs)],
            sizes=(1.0,),  # the glyphs are in points already
            transform=IdentityTransform(),
            offsets=np.round(np.stack([x, y], axis=-1), 2),
            offset_transform=self._axes.transData,
            facecolor=colour,
            linewidth=0,
        )
        self._name(stamps, name)
        self._axes.add_collection(stamps, autolim=False)

    def text(self, x: float, y: float, text: str, size: float = 8, colour: str = INK, **style: Any) -> None:
        """One line of text, its base line at ``y``. style: ha, fontweight, rotation... as matplotlib has them."""
        self._axes.text(x, y, text, fontsize=size, color=colour, family=FONT, parse_math=False, **style)

    def width_of(self, text: str, size: float) -> float:
        """Points that a line of text takes."""
        from matplotlib.textpath import text_to_path

        return float(text_to_path.get_text_width_height_descent(text, self._font(size), ismath=False)[0])

    def save(self, path: Path) -> None:
        """Writes the sheet; the suffix says how. Makes the folder if needed."""
        import matplotlib

        path.parent.mkdir(parents=True, exist_ok=True)
        # Text as outlines looks the same everywhere; without random names the same picture has the same bytes.
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "megacore"}):
            self._figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)

    def _polygons(self, corners: Floats, colour: str, style: dict[str, Any]) -> None:
        """corners: [polygons, corners, 2]. All one path: in an svg a third of the bytes of as many patches."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path as Outline

        if not len(corners):
            return
        closed = np.concatenate([corners, corners[:, :1]], axis=1).round(2)
        codes = np.full(closed.shape[:2], Outline.LINETO, Outline.code_type)
        codes[:, 0], codes[:, -1] = Outline.MOVETO, Outline.CLOSEPOLY
        patch = PathPatch(
            Outline(closed.reshape(-1, 2), codes.ravel()),
            facecolor=colour,
            edgecolor=style.get("edge", "none"),
            linewidth=style.get("line", 0.0),
            joinstyle="miter",
            clip_on=False,
        )
        self._name(patch, style.get("name", "shape"))
        self._axes.add_patch(patch)

    def _name(self, artist: Any, name: str) -> None:
        """The id of the svg's group: "idle", "idle.2", "idle.3" for what bears one name."""
        name = name.replace(" ", "-")
        self._names[name] += 1
        artist.set_gid(name if self._names[name] == 1 else f"{name}.{self._names[name]}")

    @staticmethod
    def _font(size: float) -> Any:
        from matplotlib.font_manager import FontProperties

        return FontProperties(family=FONT, size=size)
