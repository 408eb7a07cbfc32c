"""The subcommand that looks into a data set."""

from collections.abc import Iterator
from typing import Any

from megacore.corpora.report import Report, size
from megacore.data.inspection import inspect
from megacore.monitor.console import Console

UNKNOWN = "not noted (made by another tool)"


def look(prefix: str, samples: int, full: bool, console: Console) -> Report:
    """Show what a data set holds and what is wrong with it (see `inspect`)."""
    found = inspect(prefix, samples, full)
    facts = {**found.facts, "samples": found.samples, "problems": found.problems}
    lines = [f"{name:<12}{value}" for name, value in _rows(found.facts)]
    lines += [f"sample {number:<5}{sample!r}" for number, sample in enumerate(found.samples, 1)]
    return Report(facts, lines, [f"{prefix}: {problem}" for problem in found.problems])


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    empty = f" ({facts['empty_documents']:,} empty)" if facts["empty_documents"] else ""
    of_vocabulary = f" of {facts['vocab_size']:,}" if facts["vocab_size"] else ""
    largest = "-" if facts["max_id"] is None else f"{facts['max_id']:,}{of_vocabulary}"
    yield "data set", f"{facts['prefix']} ({size(facts['bytes'])})"
    yield "documents", f"{facts['documents']:,}{empty}"
    yield "sequences", f"{facts['sequences']:,}"
    yield "tokens", f"{facts['tokens']:,} ({facts['dtype']})"
    yield "lengths", f"{facts['shortest']:,} to {facts['longest']:,} tokens, {facts['mean']:,.1f} on average"
    yield "largest id", f"{largest} ({facts['checked']:.0%} of the tokens checked)"
    yield "tokenizer", facts["tokenizer"] or UNKNOWN
    yield "vocabulary", f"{facts['vocab_size']:,}" if facts["vocab_size"] else UNKNOWN
    yield "end token", "none" if facts["eod"] is None else str(facts["eod"])
