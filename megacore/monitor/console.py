"""How a run speaks to people: one object writes the same lines to the terminal and to out/log.txt.

Colours go to the terminal only, and only if the caller asks for them (`launch/terminal.py` knows when: it reads
NO_COLOR). A console without a stream and a file is silent: every rank but the first gets one of those.
"""

import re
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

STYLES = MappingProxyType(
    {
        "bold": "1", "dim": "2", "italic": "3",
        "red": "31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35", "cyan": "36",
    }
)  # fmt: skip
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
Paint = Callable[..., str]
"""paint(text, *styles) -> text, with or without escape codes."""


def plain(text: str, *styles: str) -> str:
    """A Paint that paints nothing."""
    return text


def colourful(text: str, *styles: str) -> str:
    """A Paint with ANSI colours."""
    codes = ";".join(STYLES[style] for style in styles)
    return f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text


def visible_width(text: str) -> int:
    """Columns that the text takes on a terminal: escape codes and combining marks none, wide characters two."""
    bare = ANSI.sub("", text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in bare
    )


def pad(text: str, width: int) -> str:
    """The text, filled with spaces to `width` columns (never cut)."""
    return text + " " * max(0, width - visible_width(text))


def cut(text: str, width: int) -> str:
    """As much of an unpainted text as fits into `width` columns."""
    used = 0
    for place, char in enumerate(text):
        used += visible_width(char)
        if used > width:
            return text[:place]
    return text


def human_time(seconds: float) -> str:
    """Seconds as people say them: 0.42 s, 12.3 s, 2m05s, 1h07m, 3d04h."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes}m{round(seconds) % 60:02d}s"
    hours = minutes // 60
    return f"{hours}h{minutes % 60:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def human_count(number: float) -> str:
    """A count with three digits and a unit: 950, 11.2k, 3.40M, 15.0T."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            digits = 0 if not unit else 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
            return f"{number:.{digits}f}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def human_bytes(number: float) -> str:
    """Bytes with three digits and a unit of powers of 1000: 950 B, 11.2 kB, 3.40 GB."""
    text = human_count(number)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


class Console:
    """Writes lines to `stream` and to `log_path` alike.

    stream: usually sys.stdout, or None. log_path: appended to, folder made if needed, or None. colour: whether the
    stream may get escape codes (the file never does). width: columns to lay boxes and rules out for.
    """

    def __init__(
        self, stream: TextIO | None = None, log_path: Path | None = None, colour: bool = False, width: int = 100
    ) -> None:
        self.stream = stream
        self.width = width
        self.paint: Paint = colourful if colour else plain
        self.live = colour  # a stream that takes escape codes also takes a line that is rewritten
        self._progress_shown = False
        self._log: TextIO | None = None
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = log_path.open("a", encoding="utf-8", buffering=1)

    def line(self, text: str = "") -> None:
        """Writes one line (or several, if the text has line breaks)."""
        if self.stream is not None:
            self._clear_progress()
            self._send(text + "\n")
        if self._log is not None:
            self._log.write(ANSI.sub("", text) + "\n")

    def note(self, text: str) -> None:
        """Writes a line to the log alone, where the terminal is told by somebody else."""
        if self._log is not None:
            self._log.write(text + "\n")

    def progress(self, text: str) -> None:
        """Shows a passing line on a live terminal, replaced by whatever comes next; logs and pipes never see it."""
        if self.stream is not None and self.live:
            self._clear_progress()
            self._send(cut(text, self.width - 1))
            self._progress_shown = True

    def rule(self, title: str = "") -> None:
        """A line across the page, with a title in it."""
        head = f"── {self.paint(title, 'bold')} " if title else ""
        self.line(head + self.paint("─" * (self.width - visible_width(head)), "dim"))

    def box(self, title: str, lines: Sequence[str], style: str = "cyan") -> None:
        """Lines in a frame with a title; what does not fit is wrapped if plain, else the frame grows."""
        inner = self.width - 4
        body = [part for line in lines for part in self._fit(line, inner)]
        inner = max([inner, *map(visible_width, body)])
        edge = self.paint("│", style)
        head = f"╭─ {title} " if title else "╭─"
        self.line(self.paint(head + "─" * (inner + 3 - visible_width(head)) + "╮", style))
        for line in body:
            self.line(f"{edge} {pad(line, inner)} {edge}")
        self.line(self.paint("╰" + "─" * (inner + 2) + "╯", style))

    def table(self, rows: Sequence[Sequence[str]], header: Sequence[str] = (), indent: str = "  ") -> None:
        """Rows in aligned columns; the header is dim."""
        every = [header, *rows] if header else rows
        widths = [max(visible_width(row[column]) for row in every) for column in range(len(every[0]))]
        for number, row in enumerate(every):
            cells = "  ".join(pad(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()
            self.line(indent + (self.paint(cells, "dim") if header and number == 0 else cells))

    def close(self) -> None:
        """Clears a passing line and closes the log file."""
        self._clear_progress()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _fit(self, line: str, width: int) -> list[str]:
        if visible_width(line) <= width or ANSI.search(line):
            return [line]
        return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]

    def _clear_progress(self) -> None:
        if self._progress_shown:
            self._send("\r\x1b[2K")
            self._progress_shown = False

    def _send(self, text: str) -> None:
        assert self.stream is not None
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        # A terminal that cannot show a frame or a foreign letter must not end a training run.
        self.stream.write(text.encode(encoding, "replace").decode(encoding))
        self.stream.flush()


class Phases:
    """Names and times what happens before the first step: `with phases.time("mesh"): ...`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the phase `name`, also when it ends by an exception."""
        start = self._clock()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start

    def total(self) -> float:
        """Seconds in all phases together."""
        return sum(self.seconds.values())


def phase_lines(phases: Phases, paint: Paint = plain, bar_width: int = 24) -> list[str]:
    """The start-up table: a line per phase with its time and a bar of its share, and the total below."""
    if not phases.seconds:
        return []
    name_width = max(len("start-up"), *map(len, phases.seconds))
    longest = max(phases.seconds.values()) or 1.0
    lines = [
        f"  {name:<{name_width}}  {human_time(seconds):>7}  {paint(bar(seconds / longest, bar_width), 'cyan')}".rstrip()
        for name, seconds in phases.seconds.items()
    ]
    return [*lines, paint(f"  {'start-up':<{name_width}}  {human_time(phases.total()):>7}", "bold")]


def bar(share: float, width: int) -> str:
    """A horizontal bar of `share` (0 to 1) of `width` columns, in eighths of a column."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
