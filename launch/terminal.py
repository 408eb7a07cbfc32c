"""What the terminal can show: whether to colour, and how many columns there are."""

import os
import shutil
from typing import TextIO


def colour_wanted(stream: TextIO) -> bool:
    """Whether escape codes belong there: a terminal that knows them, and no NO_COLOR (see no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def page_width() -> int:
    """Columns to lay text out for: the terminal's, at most 120; 100 where there is none."""
    return max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
