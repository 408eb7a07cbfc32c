"""Which files a corpus is made of, and how each is opened: folders, patterns, compression, standard input."""

import bz2
import glob
import gzip
import lzma
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from megacore.data.tokenizers.base import require

STDIN = "-"
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMAT_OF_SUFFIX = MappingProxyType({".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"})


class BadInput(ValueError):
    """Something in the user's files is not as it must be; the message names the file, the place and the fix."""


@dataclass(frozen=True)
class Source:
    """One file of a corpus."""

    name: str  # path, or "-" for standard input
    format: str  # text, jsonl or parquet
    compression: str  # "" or one of COMPRESSIONS
    size: int  # bytes on disk; 0: not known (a pipe)


class SourceFile:
    """An opened source: `read` gives bytes as they were before compression, `consumed` counts bytes on disk."""

    def __init__(self, source: Source, raw: IO[bytes]) -> None:
        self.source = source
        self._raw = raw
        self._stream = _decompressed(source, raw)
        self._consumed = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer, and then none, at the end.

        Raises:
            BadInput: compressed data is damaged or ends too early.
        """
        if not self.source.compression:
            return self._stream.read(size)
        try:
            return self._stream.read(size)
        except Exception as reason:  # each compression raises errors of its own
            raise BadInput(
                f"{self.source.name} is damaged or was cut off ({reason}); get the file again, or test it with the "
                f"tool that packs {self.source.compression} files"
            ) from reason

    def consumed(self) -> int:
        """Bytes read from disk since the last call (0 for a pipe)."""
        if not self.source.size:
            return 0
        before, self._consumed = self._consumed, self._raw.tell()
        return self._consumed - before


class _ZstdStream:
    """Reads zstd frames, and notices a missing end (the library's own reader takes it for the end of the data)."""

    def __init__(self, raw: IO[bytes], library: Any) -> None:
        self._raw = raw
        self._new_frame = library.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._packed = b""  # read but not yet unpacked
        self._ready = b""  # unpacked but not yet handed out
        self._inside = False  # within a frame

    def read(self, size: int) -> bytes:
        parts, count = [self._ready], len(self._ready)
        while count < size and (unpacked := self._unpack()) is not None:
            parts.append(unpacked)
            count += len(unpacked)
        data = b"".join(parts)
        self._ready = data[size:]
        return data[:size]

    def _unpack(self) -> bytes | None:
        """Some more bytes, perhaps none yet; None at the end of the file."""
        self._packed = self._packed or self._raw.read(1 << 16)
        if not self._packed:
            if self._inside:
                raise EOFError("the last frame has no end")
            return None
        unpacked: bytes = self._frame.decompress(self._packed)
        self._inside, self._packed = True, b""
        if self._frame.eof:
            self._packed, self._frame, self._inside = self._frame.unused_data, self._new_frame(), False
        return unpacked


def _decompressed(source: Source, raw: IO[bytes]) -> Any:
    if source.compression == ".gz":
        return gzip.open(raw)
    if source.compression == ".bz2":
        return bz2.open(raw)
    if source.compression == ".xz":
        return lzma.open(raw)
    if source.compression == ".zst":
        return _ZstdStream(raw, require("zstandard", source.name))
    return raw


@contextmanager
def open_source(source: Source) -> Iterator[SourceFile]:
    """Open a text or JSON lines source.

    Raises:
        BadInput: the file cannot be read.
    """
    if source.name == STDIN:
        yield SourceFile(source, sys.stdin.buffer)
        return
    try:
        raw = open(source.name, "rb")
    except OSError as reason:
        raise BadInput(f"{source.name} cannot be read: {reason.strerror}") from reason
    with raw:
        yield SourceFile(source, raw)


def find_sources(inputs: Sequence[str], format: str = "auto") -> list[Source]:
    """The files that `inputs` name: files, patterns (`data/*.jsonl.gz`), folders (all files below), "-".

    Order is that of `inputs`; within a pattern or folder, by name. In folders, hidden files and files that hold a NUL
    byte near their start (pictures, programs) are left out, Parquet and compressed files excepted.

    Raises:
        BadInput: something named is not there, or holds no file.
    """
    sources: list[Source] = []
    for name in inputs:
        sources += _expand(name, format)
    return sources


def _expand(name: str, format: str) -> list[Source]:
    if name == STDIN:
        if format not in ("text", "jsonl"):
            raise BadInput("standard input (-) has no file name to tell its format; say --format text or jsonl")
        return [Source(STDIN, format, "", 0)]
    path = Path(name).expanduser()
    if path.is_dir():
        found = [describe(file, format) for file in _files_below(path)]
        found = [source for source in found if not _is_binary(source)]
        problem = "there is no text file in this folder"
    elif path.exists():
        return [describe(path, format)]
    else:
        found = [describe(Path(match), format) for match in sorted(glob.glob(str(path), recursive=True))]
        problem = "there is no such file or folder, and no file matches it as a pattern"
    if not found:
        raise BadInput(f"--input {name}: {problem}")
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():  # a link may lead back up: never walk in circles
            yield from _files_below(path)
        elif path.is_file():
            yield path


def _is_binary(source: Source) -> bool:
    if source.compression or source.format == "parquet":
        return False
    with open_source(source) as file:
        return b"\0" in file.read(8192)


def describe(path: Path, format: str = "auto") -> Source:
    """The source of one file; "auto" takes the format from the name, and for any other name text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    if format == "auto":
        format = FORMAT_OF_SUFFIX.get(suffixes[-1] if suffixes else "", "text")
    if format == "parquet" and compression:
        raise BadInput(f"{path}: Parquet files are compressed inside; unpack the {compression} around it")
    return Source(str(path), format, compression, path.stat().st_size if path.is_file() else 0)
