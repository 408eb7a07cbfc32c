"""Files as a stream of blocks of about half a megabyte, in the order of the corpus, with memory that does not grow.

A block is the unit of work: one process reads blocks (cheap), many turn them into documents and tokens (dear). Blocks
depend on the files alone, so the result does not depend on the number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megacore.data.text.cutting import cut_place
from megacore.data.text.options import ReadOptions
from megacore.data.text.sources import BadInput, Source, SourceFile, open_source
from megacore.data.tokenizers.base import require

BLOCK_BYTES = 1 << 19


@dataclass(frozen=True)
class Block:
    """A run of whole documents of one file, or a part of one long document."""

    name: str
    """The file, for messages."""
    kind: str
    """How documents lie in `content`: jsonl, array, line, paragraph, whole or column."""
    content: bytes | list[bytes | None] = field(repr=False)
    """Bytes of the file; for a Parquet column the values."""
    line: int = 1
    """Number of the first line (of a Parquet row: from 0)."""
    offset: int = 0
    """Bytes before this block in the (unpacked) file."""
    consumed: int = 0
    """Bytes on disk that were read for this block."""
    starts: bool = True
    """The block's first document begins here."""
    ends: bool = True
    """The block's last document ends here."""

    @property
    def num_bytes(self) -> int:
        if isinstance(self.content, bytes):
            return len(self.content)
        return sum(len(value) for value in self.content if value)


def read_blocks(sources: Sequence[Source], options: ReadOptions) -> Iterator[Block]:
    """All blocks of all sources, in order.

    Raises:
        BadInput: a file cannot be read, is damaged, is not UTF-8 by its first bytes, or has no such column.
    """
    for source in sources:
        if source.format == "parquet":
            yield from _parquet_blocks(source, options)
        else:
            with open_source(source) as file:
                yield from _byte_blocks(file, options)


def _byte_blocks(file: SourceFile, options: ReadOptions) -> Iterator[Block]:
    first = _without_bom(file.read(BLOCK_BYTES), file.source.name)
    if file.source.format == "jsonl":
        if first.lstrip()[:1] == b"[":
            content = first + b"".join(iter(lambda: file.read(1 << 24), b""))
            yield Block(file.source.name, "array", content, consumed=file.consumed())
            return
        yield from _cut_blocks(file, first, "jsonl", (b"\n",))
    elif options.documents == "line":
        yield from _cut_blocks(file, first, "line", (b"\n",))
    elif options.documents == "paragraph":
        yield from _cut_blocks(file, first, "paragraph", (b"\n\n", b"\n\r\n"))
    else:
        yield from _whole_file(file, first)


def _without_bom(data: bytes, name: str) -> bytes:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        fix = f"iconv -f UTF-16 -t UTF-8 {name} > converted"
        raise BadInput(f"{name} is UTF-16 text (by its first two bytes); convert it to UTF-8: {fix}")
    return data.removeprefix(b"\xef\xbb\xbf")


def _cut_blocks(file: SourceFile, first: bytes, kind: str, separators: tuple[bytes, ...]) -> Iterator[Block]:
    """Blocks that end behind a separator; longer than usual where none comes."""
    parts: list[bytes] = []
    line, offset, data = 1, 0, first
    while data:
        # A separator may lie across two reads: look from a few bytes before this one.
        overlap = parts[-1][-2:] if parts else b""
        end = max(_behind_last(overlap + data, separator) for separator in separators) - len(overlap)
        if end > 0:
            content = b"".join([*parts, data[:end]])
            yield Block(file.source.name, kind, content, line, offset, file.consumed())
            line, offset = line + content.count(b"\n"), offset + len(content)
            parts, data = [], data[end:]
        if data:
            parts.append(data)
        data = file.read(BLOCK_BYTES)
    if parts:
        yield Block(file.source.name, kind, b"".join(parts), line, offset, file.consumed())


def _behind_last(data: bytes, separator: bytes) -> int:
    place = data.rfind(separator)
    return 0 if place < 0 else place + len(separator)


def _whole_file(file: SourceFile, first: bytes) -> Iterator[Block]:
    """One document, in several blocks if it is long."""
    line, offset, starts, data = 1, 0, True, first
    while True:
        data += file.read(BLOCK_BYTES + 1 - len(data)) if len(data) <= BLOCK_BYTES else b""
        ends = len(data) <= BLOCK_BYTES
        end = len(data) if ends else cut_place(data, BLOCK_BYTES)
        yield Block(file.source.name, "whole", data[:end], line, offset, file.consumed(), starts, ends)
        if ends:
            return
        line, offset, starts, data = line + data.count(b"\n", 0, end), offset + end, False, data[end:]


def _parquet_blocks(source: Source, options: ReadOptions) -> Iterator[Block]:
    arrow = require("pyarrow", source.name)
    parquet = require("pyarrow.parquet", source.name)
    try:
        file = parquet.ParquetFile(source.name)
    except (OSError, arrow.ArrowException) as reason:
        raise BadInput(f"{source.name} is not a Parquet file or is damaged: {reason}") from reason
    with file:
        _check_column(file, source.name, options.json_key)
        size, row, total_rows = source.size, 0, max(1, file.metadata.num_rows)
        # Rows per block from the mean size of a row, so that long documents do not fill the memory.
        groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
        row_bytes = sum(group.total_byte_size for group in groups) // total_rows + 1
        batches = file.iter_batches(max(1, min(8192, BLOCK_BYTES // row_bytes)), columns=[options.json_key])
        while (values := _next_values(batches, arrow, source.name)) is not None:
            consumed = size * (row + len(values)) // total_rows - size * row // total_rows
            yield Block(source.name, "column", values, row, consumed=consumed)
            row += len(values)


def _check_column(file: Any, name: str, column: str) -> None:
    names = file.schema_arrow.names
    if column not in names:
        raise BadInput(f"{name} has no column {column!r}; its columns are {', '.join(names)}; choose with --json-key")
    kind = str(file.schema_arrow.field(column).type)
    if not any(word in kind for word in ("string", "binary")):
        raise BadInput(f"{name}: column {column!r} holds {kind}, not text; choose another with --json-key")


def _next_values(batches: Any, arrow: Any, name: str) -> list[bytes | None] | None:
    """The next batch's values as bytes (so that bad UTF-8 is met where all bad UTF-8 is); None at the end."""
    try:
        column = next(batches).column(0)
    except StopIteration:
        return None
    except (OSError, arrow.ArrowException) as reason:
        raise BadInput(f"{name} is damaged or was cut off: {reason}") from reason
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(arrow.large_binary()).to_pylist()
    return values
