"""One colour language for pictures of pipelines: blue goes forward, red comes back, gold and plum are red's two halves.

A rank's chunks run from the dark to the light end of each hue. Any two of these colours for two chunks, and the idle
ground, lie at least 0.1 apart in Oklab, also for eyes without red, green or blue cones (simulated after Machado,
Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency", 2009).
"""

from collections.abc import Mapping
from types import MappingProxyType

from megacore.schedule.instruction import Op

INK, GREY, LINE, IDLE, PAPER = "#1f2430", "#6b7482", "#c9cfd8", "#e8ebf0", "#ffffff"

HUES: Mapping[Op, tuple[str, str]] = MappingProxyType(
    {
        Op.FORWARD: ("#2457b8", "#8fb8f2"),
        Op.BACKWARD: ("#a8341a", "#ea6a4c"),
        Op.INPUT_GRAD: ("#e9a30c", "#f8cd7c"),
        Op.WEIGHT_GRAD: ("#7a4a78", "#b583b3"),
    }
)
"""The dark and the light end of each. A pair is drawn as its two halves."""

MARKS: Mapping[Op, str] = MappingProxyType({Op.REDUCE: "#2f8f5b", Op.TIED: "#1f7a8c", Op.OPTIMIZE: "#8a93a3"})

NAMES: Mapping[Op, str] = MappingProxyType(
    {
        Op.FORWARD: "forward",
        Op.BACKWARD: "backward",
        Op.INPUT_GRAD: "input gradient",
        Op.WEIGHT_GRAD: "weight gradient",
        Op.REDUCE: "gradients summed over copies",
        Op.TIED: "tied weights",
        Op.OPTIMIZE: "optimizer",
    }
)


def shade(op: Op, chunk: int = 0, num_chunks: int = 1) -> str:
    """The colour (``#rrggbb``) of an op of a rank's chunk."""
    share = chunk / (num_chunks - 1) if num_chunks > 1 else 0.2
    ends = zip(*map(_channels, HUES[op]), strict=True)
    return "#" + "".join(f"{round(dark + share * (light - dark)):02x}" for dark, light in ends)


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better there (relative luminance as WCAG 2 defines it)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (n / 255 for n in _channels(colour))]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return INK if luminance > 0.24 else PAPER


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
