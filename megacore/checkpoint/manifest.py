"""What a checkpoint holds, where each byte of it lies, and the hashes by which that is known to be so.

A checkpoint is a folder with a manifest; one without is a save that was not finished. The manifest lists every slice of
every tensor with its place and hash, the hash of each file's header and of all small files, and its own hash: so no
byte of a checkpoint is believed unseen.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import xxhash

from megacore.checkpoint.store import Store

MANIFEST = "manifest.json"
FORMAT, VERSION = "megacore checkpoint", 1
TRAINING, WEIGHTS = "training", "weights"
"""Kinds: all that a run needs to go on, or weights alone."""

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
    | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
)
"""Of a number of each format; ``formats.DTYPES`` has torch's names for them."""
LARGEST = 1 << 60
"""More bytes or elements than this nothing has: sums of two such numbers are exact everywhere."""


def hash_of(data: bytes | memoryview) -> str:
    """XXH3 with 128 bits (Collet): as quick as memory, and any accident shows. It is no proof against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True)
class SliceEntry:
    """``[start, start + size)`` of a tensor: bytes from ``offset`` on in file number ``file``."""

    file: int
    offset: int
    start: tuple[int, ...]
    size: tuple[int, ...]
    hash: str


@dataclass(frozen=True)
class TensorEntry:
    """A tensor: its format as safetensors calls it, its shape, and the slices that it consists of."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[SliceEntry, ...]


@dataclass(frozen=True)
class FileEntry:
    """A safetensors file: its size, and the length and hash of its header."""

    name: str
    size: int
    header_size: int
    header_hash: str


@dataclass(frozen=True)
class AttachmentEntry:
    """A small file that goes with the tensors, under the name ``file`` in the folder."""

    file: str
    size: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """The whole. ``config`` is the resolved run as nested sections, ``layout`` the axes' sizes that it was saved from,
    ``state`` what else must be known to go on (of no use to other programs), ``made`` by what and when."""

    kind: str
    step: int
    config: Mapping[str, Any]
    layout: Mapping[str, int]
    state: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    files: tuple[FileEntry, ...]
    attachments: Mapping[str, AttachmentEntry] = field(default_factory=lambda: MappingProxyType({}))
    made: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def to_bytes(self) -> bytes:
        """As a file: JSON in one canonical form, with the hash of all the rest."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "step": self.step,
            "config": dict(self.config),
            "layout": dict(self.layout),
            "state": dict(self.state),
            "made": dict(self.made),
            "files": [[each.name, each.size, each.header_size, each.header_hash] for each in self.files],
            "attachments": {name: [each.file, each.size, each.hash] for name, each in self.attachments.items()},
            "tensors": {key: _listed(each) for key, each in self.tensors.items()},
        }
        return _canonical(content | {"hash": hash_of(_canonical(content))})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Read it back. Raises ValueError unless it is to the last bit what was written."""
        try:
            content = json.loads(data)
            found = content.pop("hash")
            version = content["version"] if content["format"] == FORMAT else None
            is_whole = data == _canonical(content | {"hash": found}) and hash_of(_canonical(content)) == found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{where} is not a manifest, or was damaged; use another checkpoint") from None
        if version != VERSION:
            raise ValueError(f"{where} has version {version}, this megacore reads {VERSION}; use the one that wrote it")
        if not is_whole:
            raise ValueError(f"{where} was damaged: its hash is not that of its content; use another checkpoint")
        try:
            return _manifest(content)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as reason:
            raise ValueError(f"{where} does not describe a checkpoint: {reason}") from None

    @property
    def num_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(each.size for each in self.files) + sum(each.size for each in self.attachments.values())


def read_manifest(store: Store) -> Manifest:
    """The manifest of a checkpoint's folder, and a look at the files that it lists.

    Raises ValueError that names the file which is missing, damaged or of another size.
    """
    where = f"{store.describe()}/{MANIFEST}"
    try:
        data = store.read(MANIFEST)
    except FileNotFoundError:
        raise ValueError(f"{store.describe()} is not a checkpoint: it has no {MANIFEST}") from None
    except OSError as reason:
        raise ValueError(f"{where} cannot be read: {reason}") from reason
    manifest = Manifest.from_bytes(data, where)
    sizes = {each.name: each.size for each in manifest.files}
    sizes |= {each.file: each.size for each in manifest.attachments.values()}
    for name, size in sizes.items():
        try:
            found = store.size(name)
        except OSError:
            raise ValueError(f"{store.describe()}/{name} is missing; the checkpoint is not whole") from None
        if found != size:
            raise ValueError(f"{store.describe()}/{name} has {found} bytes instead of {size}; it is not whole")
    return manifest


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _listed(entry: TensorEntry) -> list[Any]:
    slices = [[each.file, each.offset, each.start, each.size, each.hash] for each in entry.slices]
    return [entry.dtype, entry.shape, *slices]


def _manifest(content: Mapping[str, Any]) -> Manifest:
    """Everything in it is looked at: a hash shows accidents, and nothing of what somebody made up on purpose."""
    files = tuple(_file(*entry) for entry in content["files"])
    attachments = {name: _attachment(*entry) for name, entry in content["attachments"].items()}
    names = [each.name for each in files] + [each.file for each in attachments.values()]
    if len(set(names)) < len(names) or MANIFEST in names:
        raise ValueError("two of its files have one name")
    tensors = {}
    for key, (dtype, shape, *slices) in content["tensors"].items():
        if dtype not in ITEM_BYTES:
            raise ValueError(f"{key} has numbers of format {dtype!r}; known are {', '.join(ITEM_BYTES)}")
        entries = tuple(SliceEntry(_count(f), _count(o), _counts(a), _counts(n), _text(h)) for f, o, a, n, h in slices)
        tensors[key] = TensorEntry(dtype, _counts(shape), entries)
        _check_slices(key, tensors[key], files)
    config, layout, state, made = (_table(content[name]) for name in ("config", "layout", "state", "made"))
    for number in layout.values():
        _count(number)
    return Manifest(
        _text(content["kind"]), _count(content["step"]), config, layout, state, tensors, files, attachments, made
    )


def _file(name: Any, size: Any, header_size: Any, header_hash: Any) -> FileEntry:
    if _count(header_size) > _count(size):
        raise ValueError(f"the header of {name} is longer than the file")
    return FileEntry(_plain(name), size, header_size, _text(header_hash))


def _attachment(file: Any, size: Any, digest: Any) -> AttachmentEntry:
    return AttachmentEntry(_plain(file), _count(size), _text(digest))


def _plain(name: Any) -> str:
    """A file's name, which must not lead out of the folder."""
    if not _text(name) or name.startswith(".") or any(letter in name for letter in "/\\\0"):
        raise ValueError(f"{name!r} is no name of a file in the checkpoint's folder")
    return str(name)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} stands where a text belongs")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{str(value)[:40]} stands where a number from 0 to {LARGEST} belongs")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    return tuple(map(_count, values))


def _table(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]!r} stands where a table belongs")
    return value


def _check_slices(key: str, entry: TensorEntry, files: tuple[FileEntry, ...]) -> None:
    """They must lie in files that there are, and cover the tensor, each element once."""
    num = 0
    for each in entry.slices:
        fits = len(each.start) == len(each.size) == len(entry.shape) and each.file < len(files)
        inside = all(
            0 < count and first + count <= length for first, count, length in zip(each.start, each.size, entry.shape)
        )
        if not fits or not inside:
            raise ValueError(f"a slice of {key} {list(entry.shape)} lies at {list(each.start)}, {list(each.size)}")
        file = files[each.file]
        if each.offset < file.header_size or each.offset + num_bytes_of(entry, each) > file.size:
            raise ValueError(f"a slice of {key} lies at byte {each.offset} of {file.name}, which has {file.size}")
        num += numel_of(each.size)
    if num != numel_of(entry.shape):
        raise ValueError(f"the slices of {key} have {num} elements together, the tensor {numel_of(entry.shape)}")
    if _meet(entry.slices):
        raise ValueError(f"slices of {key} overlap, so others are missing")


def _meet(slices: Sequence[SliceEntry]) -> bool:
    """Whether two of them have an element in common."""
    open_ones: list[SliceEntry] = []  # those that reach the row at which the next one begins
    for each in sorted(slices, key=lambda each: each.start):
        if each.start:
            open_ones = [other for other in open_ones if other.start[0] + other.size[0] > each.start[0]]
        for other in open_ones:
            sides = zip(each.start, each.size, other.start, other.size)
            if all(a < b + m and b < a + n for a, n, b, m in sides):
                return True
        open_ones.append(each)
    return False


def num_bytes_of(entry: TensorEntry, part: SliceEntry) -> int:
    """Of a slice of a tensor."""
    return numel_of(part.size) * ITEM_BYTES[entry.dtype]


def numel_of(shape: tuple[int, ...]) -> int:
    """Elements of a shape; 1 of a scalar's."""
    number = 1
    for length in shape:
        number *= length
    return number
