"""What every pipeline rank must hold, component by component, against what its device has."""

from megacore.cost.estimate import GB, Estimate
from megacore.cost.plot.colours import GREY, INK, LINE
from megacore.cost.plot.svg import Svg

COMPONENTS = (
    ("params", "#2457b8", "parameters"),
    ("grads", "#8fb8f2", "gradients"),
    ("optimizer", "#7a4a78", "optimizer"),
    ("activations", "#e9a30c", "activations"),
    ("buffers", "#2f8f5b", "buffers"),
    ("fragmentation", "#a9b1bd", "fragmentation"),
    ("context", "#6b7482", "context"),
)
WIDTH, LEFT, RIGHT, TOP = 860.0, 64.0, 74.0, 46.0
OVER = "#a8341a"


def memory_bars(found: Estimate, capacity: float) -> str:
    """An SVG picture: a bar for each pipeline rank; ``capacity`` are the bytes of a device, of which the limit is a
    part."""
    ranks = found.memory
    row = 26.0 if len(ranks) <= 16 else max(9.0, 420 / len(ranks))
    bottom = TOP + row * len(ranks)
    svg = Svg(WIDTH, bottom + 40, f"Memory of each pipeline rank of {found.name()}")
    most = 1.04 * max(capacity, *(rank.total for rank in ranks))
    scale = (WIDTH - LEFT - RIGHT) / most
    used = [entry for entry in COMPONENTS if any(getattr(rank, entry[0]) for rank in ranks)]
    svg.legend(LEFT, 18, [(colour, name) for _, colour, name in used])
    for number, rank in enumerate(ranks):
        x, y = LEFT, TOP + number * row
        svg.text(LEFT - 8, y + row / 2 + 4, f"rank {number}" if row > 12 else str(number), min(11, row), GREY, "end")
        for name, colour, meaning in used:
            size = getattr(rank, name)
            svg.rect(x, y + 2, size * scale, row - 4, colour, f"rank {number}, {meaning}: {size / GB:.2f} GB")
            x += size * scale
        svg.text(
            x + 6, y + row / 2 + 4, f"{rank.total / GB:.1f} GB", min(11, row), OVER if rank.total > found.limit else INK
        )
    for where, colour, dash, said in (
        (found.limit, OVER, "5 3", f"limit {found.limit / GB:.1f} GB"),
        (capacity, GREY, "", f"device {capacity / GB:.0f} GB"),
    ):
        x = LEFT + where * scale
        svg.line([(x, TOP - 6), (x, bottom + 4)], colour, 1.4, dash)
        end = where == found.limit
        svg.text(x - 4 if end else x, bottom + (18 if end else 32), said, 11, colour, "end")
    svg.line([(LEFT, TOP - 4), (LEFT, bottom + 2)], LINE)
    return svg.markup()
