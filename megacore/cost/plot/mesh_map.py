"""Which rank sits where: nodes as rows of devices, each with its place on every axis."""

from megacore.cost.plot.colours import GREY, INK, LINE, PAPER, ink_on
from megacore.cost.plot.svg import Svg, blend
from megacore.layout.layout import Layout

HUES = ("#2457b8", "#a8341a", "#e9a30c", "#2f8f5b", "#7a4a78", "#1f7a8c", "#b3476b", "#5b6bb0")
MOST_NODES = 32
BOX, HIGH, LEFT, TOP = 94.0, 44.0, 76.0, 56.0


def mesh_map(layout: Layout, gpus_per_node: int) -> str:
    """An SVG picture of the first nodes of a layout, and of the last: hues are pipeline ranks, shades are replicas."""
    nodes = -(-layout.world // gpus_per_node)
    shown = list(range(nodes)) if nodes <= MOST_NODES else [*range(MOST_NODES - 4), *range(nodes - 3, nodes)]
    gap = 0 if nodes <= MOST_NODES else 26
    wide = min(gpus_per_node, layout.world, 16)
    lines = -(-min(gpus_per_node, layout.world) // wide)
    height = TOP + len(shown) * HIGH * lines + gap + 14
    svg = Svg(LEFT + wide * BOX + 16, height, f"Ranks of {layout.describe()} on {nodes} nodes")
    svg.text(
        LEFT,
        18,
        "hue: pipeline rank; shade: data-parallel replica; a line: where a tensor-parallel group begins",
        11,
        GREY,
    )
    axes = [axis for axis in ("tp", "cp", "dp", "pp") if getattr(layout, axis) > 1]
    axes += [axis for axis in ("ep", "etp") if layout.ep > 1 and getattr(layout, axis) > 1]
    svg.text(LEFT, 36, f"on each device: rank, then its place on {', '.join(axes) or 'no axis'}", 11, GREY)
    y = TOP
    for place, node in enumerate(shown):
        if gap and place == MOST_NODES - 4:
            svg.text(LEFT, y + 17, f"… {nodes - len(shown):,} more nodes …", 11, GREY)
            y += gap
        svg.text(LEFT - 10, y + HIGH / 2 + 4, f"node {node}", 11, INK, "end", bold=True)
        for device in range(min(gpus_per_node, layout.world - node * gpus_per_node)):
            rank = node * gpus_per_node + device
            _device(svg, layout, rank, axes, LEFT + device % wide * BOX, y + device // wide * HIGH)
        y += HIGH * lines
    return svg.markup()


def _device(svg: Svg, layout: Layout, rank: int, axes: list[str], x: float, y: float) -> None:
    at = layout.coordinate(rank)
    share = at["dp"] / max(1, layout.dp - 1)
    colour = blend(HUES[at["pp"] % len(HUES)], PAPER, 0.15 + 0.6 * share)
    ink = ink_on(colour)
    places = " ".join(f"{axis}{at[axis]}" for axis in axes)
    tip = f"rank {rank}: " + ", ".join(f"{axis} {at[axis]}" for axis in ("tp", "cp", "pp", "dp", "ep", "etp", "edp"))
    svg.rect(x + 2, y + 2, BOX - 4, HIGH - 4, colour, tip, rx=4)
    svg.text(x + BOX / 2, y + 18, f"{rank}", 12, ink, "middle", bold=True)
    svg.text(x + BOX / 2, y + 33, places, min(10.0, 1.6 * (BOX - 8) / max(1, len(places))), ink, "middle")
    if layout.tp > 1 and layout.order[-1] == "tp" and at["tp"] == 0:
        svg.line([(x + 1, y + 3), (x + 1, y + HIGH - 3)], INK, 2)
        svg.line([(x + 1, y + HIGH - 1), (x + BOX * min(layout.tp, 16) - 1, y + HIGH - 1)], LINE, 1)
