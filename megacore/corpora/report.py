"""What a command hands back: figures for programs, lines for people."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megacore.monitor.console import human_count


@dataclass(frozen=True)
class Report:
    """The outcome of a command."""

    facts: dict[str, Any]
    """For `--json`."""
    lines: Sequence[str]
    """The same for people."""
    problems: Sequence[str] = ()
    """What is wrong with what was looked at, whole messages; empty: nothing found."""


def count(number: int, what: str) -> str:
    """`1 document`, `1,234 documents`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def size(num_bytes: int) -> str:
    """`950B`, `3.40MB`."""
    return f"{human_count(num_bytes)}B"
