"""The `.bin/.idx` data set: raw tokens and where each sequence and document of them starts. Reader and writer.

The layout is Megatron-LM's indexed data set (MMIDIDX, version 1), byte for byte, so that data sets go both ways.

`.bin`: the tokens of all sequences, one after the other. `.idx`, little-endian, no padding:

    9 bytes "MMIDIDX\\0\\0" | u64 version | u8 dtype | u64 S = sequences | u64 D = documents + 1
    i32[S] lengths in tokens | i64[S] byte offsets | i64[D] document bounds as sequence numbers | optional i8[S] modes

A document is a run of sequences (nearly always one); an empty document has none.
"""

import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megacore.data import native
from megacore.data.files import replace_file, scratch_folder, sync_folder

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: Mapping[int, np.dtype[Any]] = MappingProxyType(
    dict(enumerate(map(np.dtype, ("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2")), start=1))
)
DTYPE_CODES = MappingProxyType({dtype: code for code, dtype in DTYPES.items()})
MAX_LENGTH = 2**31 - 1  # lengths are stored as int32
MAX_U16_VOCAB = 65500  # Megatron's bound for two-byte tokens; equal bytes need the equal bound


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron's tools pick for a vocabulary: uint16 below 65,500 tokens, else int32."""
    return np.dtype("<u2") if vocab_size < MAX_U16_VOCAB else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """`PREFIX.bin`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`PREFIX.idx`."""
    return Path(f"{prefix}.idx")


def meta_path(prefix: str | Path) -> Path:
    """`PREFIX.meta.json`, what megacore knows beyond the two files (see meta.py)."""
    return Path(f"{prefix}.meta.json")


class IndexedDataset:
    """A memory-mapped `.bin/.idx` pair, checked when it is opened. Slices are views: no token is copied.

    Args:
        prefix: path without `.bin` / `.idx`.
        with_modes: the file ends with one int8 per sequence (nothing in the file says so; the reader must know).

    Raises:
        ValueError: a file is missing, empty, truncated, damaged or of another format; the message names file and fix.
    """

    prefix: str
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]  # [S] tokens of each sequence
    offsets: NDArray[np.int64]  # [S] first byte of each sequence in the .bin
    bounds: NDArray[np.int64]  # [documents + 1] first sequence of each document; last: S
    modes: NDArray[np.int8] | None  # [S]
    tokens: NDArray[Any]  # [num_tokens] the whole .bin
    index_hash: int  # of lengths and bounds: all that an .idx says

    def __init__(self, prefix: str | Path, with_modes: bool = False) -> None:
        self.prefix = str(prefix)
        index, data = idx_path(prefix), bin_path(prefix)
        _check_present(self.prefix, index, data)
        raw = np.memmap(index, dtype=np.uint8, mode="r")
        self.dtype, num_sequences, num_bounds = _read_header(index, raw)
        sections = _Sections(raw, HEADER.size)
        self.lengths = sections.take("<i4", num_sequences)
        self.offsets = sections.take("<i8", num_sequences)
        self.bounds = sections.take("<i8", num_bounds)
        self.modes = sections.take("<i1", num_sequences) if with_modes else None
        self.index_hash = _check_index(index, self.lengths, self.offsets, self.bounds, self.dtype.itemsize)
        self.tokens = _map_tokens(index, data, self.dtype, self.num_tokens)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, sequence: int) -> NDArray[Any]:
        return self.sequence(sequence)

    @property
    def num_sequences(self) -> int:
        """Sequences; the unit of splits and of shuffling."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.bounds) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the `.bin`."""
        if not len(self.lengths):
            return 0
        return int(self.offsets[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def start(self, sequence: int) -> int:
        """Position of a sequence's first token in `tokens`."""
        return int(self.offsets[sequence]) // self.dtype.itemsize

    def sequence(self, sequence: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Tokens [start, stop) of a sequence, a view.

        Raises:
            IndexError: there is no such sequence or no such range in it.
        """
        if not 0 <= sequence < len(self.lengths):
            raise IndexError(f"sequence {sequence} of {self.prefix}: there are {len(self.lengths)}")
        length = int(self.lengths[sequence])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens [{start}, {stop}) of sequence {sequence} of {self.prefix}: it has {length}")
        first = self.start(sequence)
        return self.tokens[first + start : first + stop]

    def document(self, document: int) -> NDArray[Any]:
        """All tokens of a document, a view (its sequences lie one after the other).

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.prefix}: there are {self.num_documents}")
        first, last = int(self.bounds[document]), int(self.bounds[document + 1])
        if first == last:
            return self.tokens[:0]
        return self.tokens[self.start(first) : self.start(last - 1) + int(self.lengths[last - 1])]

    def document_of(self, sequence: int) -> int:
        """The document that a sequence belongs to."""
        return int(np.searchsorted(self.bounds, sequence, side="right")) - 1


class _Sections:
    """Cuts the mapped `.idx` into arrays, one after the other."""

    def __init__(self, raw: NDArray[np.uint8], first: int) -> None:
        self.raw, self.next = raw, first

    def take(self, dtype: str, count: int) -> NDArray[Any]:
        start, self.next = self.next, self.next + count * np.dtype(dtype).itemsize
        return np.frombuffer(self.raw, dtype=dtype, count=count, offset=start) if count else np.empty(0, dtype)


def _check_present(prefix: str, index: Path, data: Path) -> None:
    for path, other in ((index, data), (data, index)):
        if path.is_file():
            continue
        if prefix.endswith((".bin", ".idx")):
            hint = f"give the prefix without its ending: {prefix[:-4]}"
        elif other.is_file():
            hint = f"{other.name} alone is there: copying or preparing was interrupted; do it again"
        else:
            hint = "a data set is named by its path without .bin/.idx; make one with `megacore data prepare`"
        raise ValueError(f"{path} does not exist; {hint}")
    if index.stat().st_size == 0:
        raise ValueError(f"{index} is empty: writing it was interrupted; prepare or copy the data set again")


def _read_header(index: Path, raw: NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
    """dtype, sequences and document bounds of an `.idx`; the file is as long as these ask for."""
    again = "prepare or copy the data set again"
    if raw[: len(MAGIC)].tobytes() != MAGIC[: raw.size]:
        raise ValueError(f"{index} is not an indexed data set: it does not start with MMIDIDX; {again}")
    if raw.size < HEADER.size:
        raise ValueError(f"{index} is truncated: {raw.size} bytes, its header has {HEADER.size}; {again}")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(raw[: HEADER.size].tobytes())
    if version != VERSION:
        raise ValueError(f"{index} has version {version}; only version {VERSION} is known; {again}")
    if code not in DTYPES:
        raise ValueError(f"{index} has dtype code {code}; known are 1 to {len(DTYPES)}; {again}")
    needed = HEADER.size + num_sequences * (4 + 8) + num_bounds * 8
    if raw.size not in (needed, needed + num_sequences):
        kind = "truncated" if raw.size < needed else "damaged"
        counts = f"{num_sequences} sequences and {num_bounds} document bounds"
        raise ValueError(f"{index} is {kind}: {raw.size} bytes, but {counts} take {needed}; {again}")
    return DTYPES[code], num_sequences, num_bounds


def _check_index(
    index: Path, lengths: NDArray[np.int32], offsets: NDArray[np.int64], bounds: NDArray[np.int64], itemsize: int
) -> int:
    """A hash of the index, once it is found to be sound."""
    again = "prepare or copy the data set again"
    bad_length, bad_offset, bad_bound, content = native.loops.scan(lengths, offsets, bounds, itemsize)
    if bad_length >= 0:
        raise ValueError(f"{index} is damaged: sequence {bad_length} has length {lengths[bad_length]}; {again}")
    if bad_offset >= 0:
        raise ValueError(f"{index} is damaged: sequence {bad_offset} does not start where the one before ends; {again}")
    if bad_bound >= 0 or not len(bounds):
        rule = f"document bounds must rise from 0 to the {len(lengths)} sequences"
        raise ValueError(f"{index} is damaged: {rule}; {again}")
    return int(content)


def _map_tokens(index: Path, data: Path, dtype: np.dtype[Any], num_tokens: int) -> NDArray[Any]:
    size, needed = data.stat().st_size, num_tokens * dtype.itemsize
    if size != needed:
        kind = "truncated or still being written" if size < needed else "longer than its index says"
        counts = f"{size} bytes, but {index.name} counts {num_tokens} tokens of {dtype.itemsize} bytes = {needed}"
        raise ValueError(f"{data} is {kind}: {counts}; prepare or copy both files again")
    if not num_tokens:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(data, dtype=dtype, mode="r").view(np.ndarray)


class IndexedWriter:
    """Writes a `.bin/.idx` pair as a stream: memory does not grow with the corpus, and nothing is seen until the end.

    Use as a context manager: leaving it puts both files in place (the `.idx` last: without it there is no data set);
    leaving it by an exception leaves the old files as they were.

    Args:
        prefix: path without `.bin` / `.idx`; files of that name are replaced, and an old `.meta.json` removed.
        dtype: how a token is stored; see `token_dtype`.
        with_modes: store one int8 per sequence behind the index.

    Raises:
        ValueError: the folder is missing or not writable; a token does not fit `dtype`; a sequence is too long.
    """

    def __init__(self, prefix: str | Path, dtype: Any, with_modes: bool = False) -> None:
        self.prefix, self.dtype, self.with_modes = str(prefix), np.dtype(dtype).newbyteorder("<"), with_modes
        if self.dtype not in DTYPE_CODES:
            raise ValueError(f"dtype {self.dtype} cannot be stored in {prefix}.idx; use uint16 or int32")
        self.num_sequences = self.num_documents = self.num_tokens = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = stack.enter_context(scratch_folder(idx_path(self.prefix)))
            self._data = stack.enter_context(self._open("bin"))
            self._lengths = stack.enter_context(self._open("lengths"))
            self._bounds = stack.enter_context(self._open("bounds"))
            self._modes = stack.enter_context(self._open("modes"))
            self._stack = stack.pop_all()
        self._bounds.write(bytes(8))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                self._finish()

    def add_document(self, tokens: ArrayLike) -> None:
        """Add a document of one sequence; an empty document adds a bound but no sequence.

        Args:
            tokens: [n] integers.
        """
        tokens = np.asarray(tokens)
        if tokens.size:
            self.add_sequence(tokens)
        self.end_document()

    def add_sequence(self, tokens: ArrayLike, mode: int = 0) -> None:
        """Add a sequence to the document being written; `end_document` closes it."""
        tokens = np.asarray(tokens)
        self._write(tokens, np.array([tokens.size], np.int64), np.array([mode], "<i1"))

    def end_document(self) -> None:
        """Close the document being written."""
        self._bounds.write(struct.pack("<q", self.num_sequences))
        self.num_documents += 1

    def add_documents(self, tokens: ArrayLike, lengths: ArrayLike) -> None:
        """Add many documents of one sequence each, at once.

        Args:
            tokens: [sum of lengths] integers, the documents one after the other.
            lengths: [documents] tokens of each; 0: an empty document.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, np.int64)
        if lengths.sum() != tokens.size:
            raise ValueError(f"lengths sum to {lengths.sum()}, but there are {tokens.size} tokens; pass equal counts")
        bounds = self.num_sequences + np.cumsum(lengths > 0, dtype="<i8")
        kept = lengths[lengths > 0]
        self._write(tokens, kept, np.zeros(len(kept), "<i1"))
        self._bounds.write(bounds.tobytes())
        self.num_documents += len(lengths)

    def add_dataset(self, source: IndexedDataset) -> None:
        """Add all of another data set of the same dtype.

        Raises:
            ValueError: its dtype or its modes differ from this one's.
        """
        if source.dtype != self.dtype:
            rule = f"{source.prefix} holds {source.dtype}, {self.prefix} holds {self.dtype}"
            raise ValueError(f"{rule}; merge data sets of one dtype, or prepare them with one tokenizer")
        if (source.modes is not None) != self.with_modes:
            raise ValueError(f"{source.prefix} and {self.prefix} do not both have modes; merge alike data sets")
        with open(bin_path(source.prefix), "rb") as data:
            shutil.copyfileobj(data, self._data, 1 << 24)
        self._lengths.write(source.lengths.tobytes())
        self._bounds.write((source.bounds[1:] + self.num_sequences).astype("<i8").tobytes())
        if source.modes is not None:
            self._modes.write(source.modes.tobytes())
        self.num_sequences += source.num_sequences
        self.num_documents += source.num_documents
        self.num_tokens += source.num_tokens

    def _open(self, part: str) -> BinaryIO:
        return open(self._folder / part, "wb", buffering=1 << 20)

    def _write(self, tokens: NDArray[Any], lengths: NDArray[np.int64], modes: NDArray[np.int8]) -> None:
        if tokens.dtype != self.dtype:
            tokens = _convert(tokens, self.dtype, self.prefix)
        if len(lengths) and lengths.max() > MAX_LENGTH:
            rule = f"a sequence of {lengths.max()} tokens does not fit {self.prefix}.idx (at most {MAX_LENGTH})"
            raise ValueError(f"{rule}; cut the document into parts")
        self._data.write(np.ascontiguousarray(tokens).data)
        self._lengths.write(lengths.astype("<i4").tobytes())
        if self.with_modes:
            self._modes.write(modes.tobytes())
        self.num_sequences += len(lengths)
        self.num_tokens += tokens.size

    def _finish(self) -> None:
        for part in (self._data, self._lengths, self._bounds, self._modes):
            part.flush()
        index = self._folder / "idx"
        with open(index, "wb", buffering=1 << 20) as file:
            code, num_bounds = DTYPE_CODES[self.dtype], self.num_documents + 1
            file.write(HEADER.pack(MAGIC, VERSION, code, self.num_sequences, num_bounds))
            self._copy("lengths", file)
            for offsets in self._offsets():
                file.write(offsets.tobytes())
            self._copy("bounds", file)
            self._copy("modes", file)
        final = idx_path(self.prefix)
        for old in (meta_path(self.prefix), final):  # the old index must not be read with the new tokens
            old.unlink(missing_ok=True)
        replace_file(self._folder / "bin", bin_path(self.prefix))
        replace_file(index, final)
        sync_folder(final.parent)

    def _copy(self, part: str, file: BinaryIO) -> None:
        with open(self._folder / part, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 24)

    def _offsets(self) -> Iterator[NDArray[np.int64]]:
        """Byte offsets in blocks, from the lengths already written."""
        first, block = 0, 1 << 20
        with open(self._folder / "lengths", "rb") as file:
            while chunk := file.read(block * 4):
                ends = first + np.cumsum(np.frombuffer(chunk, "<i4"), dtype="<i8") * self.dtype.itemsize
                yield np.concatenate([np.array([first], "<i8"), ends[:-1]])
                first = int(ends[-1])


def _convert(tokens: NDArray[Any], dtype: np.dtype[Any], prefix: str) -> NDArray[Any]:
    """Tokens in the stored dtype; what does not fit is an error, never wrapped around."""
    if tokens.size and dtype.kind in "iu":
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens for {prefix} are {tokens.dtype}; pass integers")
        low, high, limits = int(tokens.min()), int(tokens.max()), np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            bad = low if low < limits.min else high
            raise ValueError(f"token id {bad} does not fit {dtype} of {prefix}; pass a wider dtype (token_dtype)")
    return tokens.astype(dtype)


def merge(sources: list[str], prefix: str | Path, with_modes: bool = False) -> None:
    """Write the concatenation of data sets, in the order given, with memory that does not grow with them.

    Raises:
        ValueError: there are no sources, `prefix` is one of them, or their dtypes differ.
    """
    if not sources:
        raise ValueError("there is nothing to merge; name at least one data set")
    if os.path.realpath(prefix) in {os.path.realpath(source) for source in sources}:
        raise ValueError(f"{prefix} is to be merged into itself; name another output")
    first = IndexedDataset(sources[0], with_modes)
    with IndexedWriter(prefix, first.dtype, with_modes) as writer:
        for source in sources:
            writer.add_dataset(IndexedDataset(source, with_modes))
