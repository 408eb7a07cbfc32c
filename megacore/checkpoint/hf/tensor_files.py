"""safetensors files of unknown origin: their headers believed only where they add up, and slices of their tensors.

The format: 8 bytes, the header's length; the header, JSON: of each tensor its format, its shape and where its bytes
begin and end behind the header; then the bytes, one tensor after the other without gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from megacore.checkpoint.formats import DTYPES, bytes_of
from megacore.checkpoint.hf.strict_json import read_object
from megacore.checkpoint.store import LocalStore, Store

MAX_HEADER_BYTES = 100_000_000
BLOCK_BYTES = 1 << 24
"""Read at once where more than what is wanted has to be read."""

SEEK_BYTES = 1 << 15
"""Bytes that are sooner read than skipped."""

NUMBERS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file ``file`` of ``store``, ``offset`` bytes from its beginning."""

    store: Store
    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of all its numbers."""
        return prod(self.shape) * self.dtype.itemsize

    def fill(self, start: Sequence[int], out: Tensor) -> None:
        """Write the slice that begins at ``start`` and has the shape of ``out`` into it, a tensor or a view of one.

        Raises ValueError where the file ends before.
        """
        assert out.dim() == len(self.shape) == len(start), (self.shape, start, out.shape)
        if not out.numel():
            return
        row_shape = self.shape[1:]
        if out.shape[1:] == row_shape and out.is_contiguous() and out.dtype == self.dtype:
            self._read_rows(start[0], out)
            return
        row_bytes = prod(row_shape) * self.dtype.itemsize
        wanted = prod(out.shape[1:]) * self.dtype.itemsize
        if len(self.shape) == 2 and isinstance(self.store, LocalStore) and row_bytes - wanted > SEEK_BYTES:
            self._fill_row_by_row(start, out)
            return
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        columns = tuple(slice(at, at + n) for at, n in zip(start[1:], out.shape[1:]))
        for row in range(0, out.shape[0], step):
            count = min(step, out.shape[0] - row)
            block = torch.empty((count, *row_shape), dtype=self.dtype)
            self._read_rows(start[0] + row, block)
            out[row : row + count].copy_(block[(slice(None), *columns)])

    def _read_rows(self, first: int, out: Tensor) -> None:
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        self._read_into(first * row_bytes, out)

    def _fill_row_by_row(self, start: Sequence[int], out: Tensor) -> None:
        item, width = self.dtype.itemsize, self.shape[1]
        rows = torch.empty(out.shape, dtype=self.dtype)
        for row in range(out.shape[0]):
            self._read_into(((start[0] + row) * width + start[1]) * item, rows[row])
        out.copy_(rows)

    def _read_into(self, begin: int, out: Tensor) -> None:
        self.store.read_into(self.file, self.offset + begin, bytes_of(out))


def read_header(store: Store, file: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Raises ValueError that names the file for a header that is not JSON, lies about lengths, or names a tensor twice.
    """
    where = f"{store.describe()}/{file}"
    size = store.size(file)
    length_bytes = bytearray(8)
    if size < 8:
        raise ValueError(f"{where} has {size} bytes: it is no safetensors file, or was cut short")
    store.read_into(file, 0, memoryview(length_bytes))
    length = int.from_bytes(length_bytes, "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"{where} claims a header of {length} bytes: it is no safetensors file, or was cut short")
    header = bytearray(length)
    store.read_into(file, 8, memoryview(header))
    table = read_object(bytes(header), f"the header of {where}")
    table.pop("__metadata__", None)
    room = size - 8 - length
    ranges, found = [], {}
    for name, entry in table.items():
        dtype, shape, begin, end = _entry(entry, f"{where}: tensor {name!r}")
        if not (0 <= begin <= end <= room and end - begin == prod(shape) * dtype.itemsize):
            raise ValueError(
                f"{where}: tensor {name!r} of shape {list(shape)} claims bytes {begin} to {end} of {room}: the file "
                "was cut short, or its header is wrong"
            )
        ranges.append((begin, end))
        found[name] = StoredTensor(store, file, 8 + length + begin, shape, dtype)
    last = 0
    for begin, end in sorted(ranges):
        if begin != last:
            raise ValueError(
                f"{where}: bytes {min(begin, last)} to {max(begin, last)} belong to two tensors or to none"
            )
        last = end
    if last != room:
        raise ValueError(f"{where} has {room - last} bytes behind its last tensor: its header is wrong")
    return found


def _entry(entry: Any, what: str) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """(format, shape, begin, end) of one tensor's entry."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{what} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} is of dtype {dtype!r}, which is not supported")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{what} has shape {shape!r} and data_offsets {offsets!r}, which are no lists of sizes")
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 62 for each in value)
