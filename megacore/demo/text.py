"""Stage 1: the text, as documents in a JSON lines file."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megacore.data import found_text
from megacore.data.text.sources import find_sources
from megacore.demo.workshop import Workshop

SOURCE_BYTES = 1_500_000  # of library source code, beside all topics and docstrings
USER_BYTES = 20_000_000  # of the user's text: more would not be read in a few minutes of training
FAST_BYTES = 600_000
LEAST_BYTES = 20_000  # a smaller text teaches nothing


@dataclass(frozen=True)
class Corpus:
    """Where the text lies and how much it is."""

    path: Path
    num_documents: int
    num_bytes: int


def gather(shop: Workshop) -> Corpus:
    """Gather the user's text, or Python's own.

    Raises:
        ValueError: a file cannot be read, or there is too little text to learn from.
    """
    shop.title("1 · Text")
    options, path = shop.options, shop.out / "corpus.jsonl"
    files = [[source.name, source.size, _mtime(source.name)] for source in find_sources(options.text)]
    inputs = [files or sys.version, SOURCE_BYTES, USER_BYTES, options.fast]
    if not shop.unchanged("text", inputs, path):
        texts = list(_user_text(shop) if options.text else _python_text(shop))
        size = sum(len(text.encode("utf-8")) for text in texts)
        if size < LEAST_BYTES:
            raise ValueError(
                f"--text holds {size:,} bytes of text, too few to learn from; give {LEAST_BYTES:,} or more"
            )
        found_text.write_corpus(texts, path)
        shop.stamps.done("text", inputs)
    lines = path.read_bytes().splitlines()
    corpus = Corpus(path, len(lines), sum(map(len, lines)))
    shop.result(f"{corpus.num_bytes / 1e6:.1f} MB in {corpus.num_documents:,} documents", path)
    return corpus


def _python_text(shop: Workshop) -> Iterator[str]:
    """The text that comes with Python."""
    files = found_text.library_files()
    every = [("pages of the language reference", found_text.topics())]
    if not shop.options.fast:
        every.append(("modules' docstrings", found_text.docstrings(files)))
        every.append(("source files of the library", found_text.sources(files, SOURCE_BYTES)))
    for name, texts in every:
        shop.passing(f"reading {name} ...")
        found = list(texts)
        shop.console.line(f"  {len(found):>5} {name:<32} {sum(map(len, found)) / 1e6:5.2f} MB")
        yield from found


def _user_text(shop: Workshop) -> Iterator[str]:
    """The text of the user's files."""
    limit = FAST_BYTES if shop.options.fast else USER_BYTES
    num_texts = size = 0
    for text in found_text.user_texts(shop.options.text, limit):
        num_texts, size = num_texts + 1, size + len(text.encode("utf-8"))
        yield text
    shop.console.line(f"  read {size / 1e6:.2f} MB, {num_texts:,} text{'s' * (num_texts != 1)}")
    if size >= limit:
        shop.console.line(f"  there may be more, but {limit / 1e6:.1f} MB are enough for a few minutes")


def _mtime(path: str) -> int:
    """When the file was last written, in nanoseconds."""
    return Path(path).stat().st_mtime_ns
