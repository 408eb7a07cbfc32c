"""What torch.save wrote: a zip of one pickle and the bytes of its storages, each stored as it is.

Only the pickle is read (by `unpickle`); of the tensors it is found out where in the file their numbers lie, so that
slices of them can be read without the rest. The same zip may be a part of a larger file, as in `.distcp` files.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megacore.checkpoint.hf.tensor_files import StoredTensor
from megacore.checkpoint.megatron.unpickle import TensorNote, load
from megacore.checkpoint.store import Store

LOCAL_HEADER_BYTES = 30
"""Of a zip's entry, before its name."""


@dataclass(frozen=True)
class Archive:
    """``value`` is what was saved, with a `TensorNote` for each tensor; ``records`` are (begin, bytes) in ``file``."""

    store: Store
    file: str
    what: str
    value: Any
    records: Mapping[str, tuple[int, int]]

    def locate(self, note: TensorNote, name: str) -> StoredTensor:
        """Where a tensor's numbers lie. Raises ValueError where they are not there or not in order."""
        storage, expected = note.storage, 1
        for size, step in zip(reversed(note.shape), reversed(note.stride), strict=True):
            if size != 1 and step != expected:
                raise ValueError(f"{self.what}: the numbers of {name} are not contiguous; save a contiguous copy")
            expected *= size
        begin, size = self.records.get(storage.key, (0, 0))
        item = storage.dtype.itemsize
        if (note.offset + expected) * item > size:
            raise ValueError(
                f"{self.what}: {name} of shape {list(note.shape)} needs more than the {size} bytes that are there"
            )
        return StoredTensor(self.store, self.file, begin + note.offset * item, note.shape, storage.dtype)


def read_archive(store: Store, file: str, begin: int = 0, size: int | None = None) -> Archive:
    """The zip in bytes ``[begin, begin + size)`` of a file (all of it).

    Raises ValueError for other formats and for damage, and where its pickle names what is not allowed.
    """
    where = f"{store.describe()}/{file}"
    what = where if size is None else f"{where} at byte {begin}"
    room = store.size(file) - begin
    size = room if size is None else size
    if not 0 <= size <= room or begin < 0:
        raise ValueError(f"{where} ends before byte {begin + size}: it was cut short")
    window = _Window(store, file, begin, size)
    try:
        with zipfile.ZipFile(io.BufferedReader(window)) as archive:
            return _opened(archive, window, store, file, what)
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, EOFError) as reason:
        raise ValueError(
            f"{what} is not what torch.save of PyTorch 1.6 or later writes, or was damaged ({reason}); load and save "
            "an older file anew where that does no harm"
        ) from reason


def _opened(archive: zipfile.ZipFile, window: "_Window", store: Store, file: str, what: str) -> Archive:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1 or len(entries) != len(archive.infolist()):
        raise ValueError(f"{what} is a zip, but not one that torch.save wrote: it has {len(pickles)} pickles")
    home = pickles[0].removesuffix("data.pkl")
    for entry in entries.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{what}: {entry.filename} is compressed, which torch.save never does; it is refused")
    order = f"{home}byteorder"
    if order in entries and archive.read(order) != b"little":
        raise ValueError(f"{what} was saved by a big-endian machine, which is not supported")
    records = {
        name.removeprefix(f"{home}data/"): (window.begin + _begin(window, entry, what), entry.file_size)
        for name, entry in entries.items()
        if name.startswith(f"{home}data/")
    }
    with archive.open(pickles[0]) as file_of_pickle:
        value = load(file_of_pickle, entries[pickles[0]].file_size, what)
    return Archive(store, file, what, value, records)


def _begin(window: "_Window", entry: zipfile.ZipInfo, what: str) -> int:
    """Where an entry's bytes begin in the window: behind its own header, whose length only that tells."""
    header = bytearray(LOCAL_HEADER_BYTES)
    window.fill(entry.header_offset, memoryview(header))
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"{what} was damaged: {entry.filename} does not begin where its zip says")
    begin = entry.header_offset + LOCAL_HEADER_BYTES
    begin += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if begin + entry.file_size > window.size:
        raise ValueError(f"{what} was cut short: {entry.filename} ends behind it")
    return begin


class _Window(io.RawIOBase):
    """Bytes ``[begin, begin + size)`` of a file as a file."""

    def __init__(self, store: Store, file: str, begin: int, size: int) -> None:
        self.store, self.file, self.begin, self.size, self.at = store, file, begin, size, 0

    def fill(self, at: int, buffer: memoryview) -> None:
        """Read exactly so many bytes."""
        if not 0 <= at <= self.size - len(buffer):
            raise EOFError(f"it ends before byte {at + len(buffer)}")
        self.store.read_into(self.file, self.begin + at, buffer)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self.at, self.size)[whence]
        if at < 0:
            raise EOFError(f"byte {at} is before its beginning")
        self.at = at
        return at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self.at))
        if count:
            self.store.read_into(self.file, self.begin + self.at, view[:count])
            self.at += count
        return count
