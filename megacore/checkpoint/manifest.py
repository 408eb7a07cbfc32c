"""What a checkpoint holds, where each byte of it lies, and the hashes by which that is known to be so.

A checkpoint is a folder with a manifest; one without is a save that was not finished. The manifest lists every slice of
every tensor with its place and hash, the hash of each file's header and of all small files, and its own hash: so no
byte of a checkpoint is believed unseen.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import xxhash

from megacore.checkpoint.store import Store

MANIFEST = "manifest.json"
FORMAT, VERSION = "megacore checkpoint", 1
TRAINING, WEIGHTS = "training", "weights"
"""Kinds: all that a run needs to go on, or weights alone."""


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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{where} is not a manifest, or was damaged; use another checkpoint") from None
        if version != VERSION:
            raise ValueError(f"{where} has version {version}, this megacore reads {VERSION}; use the one that wrote it")
        if data != _canonical(content | {"hash": found}) or hash_of(_canonical(content)) != found:
            raise ValueError(f"{where} was damaged: its hash is not that of its content; use another checkpoint")
        try:
            return _manifest(content)
        except (KeyError, TypeError, ValueError, IndexError) as reason:
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
    files = tuple(FileEntry(_plain(name), *rest) for name, *rest in content["files"])
    attachments = {name: AttachmentEntry(_plain(file), *rest) for name, (file, *rest) in content["attachments"].items()}
    tensors = {}
    for key, (dtype, shape, *slices) in content["tensors"].items():
        entries = tuple(SliceEntry(f, o, tuple(start), tuple(size), digest) for f, o, start, size, digest in slices)
        tensors[key] = TensorEntry(dtype, tuple(shape), entries)
        _check_slices(key, tensors[key], files)
    kind, step, config, layout, state = (content[name] for name in ("kind", "step", "config", "layout", "state"))
    return Manifest(kind, step, config, layout, state, tensors, files, attachments, content["made"])


def _plain(name: str) -> str:
    """A file's name, which must not lead out of the folder."""
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a file in the checkpoint's folder")
    return name


def _check_slices(key: str, entry: TensorEntry, files: tuple[FileEntry, ...]) -> None:
    num = 0
    for each in entry.slices:
        fits = len(each.start) == len(each.size) == len(entry.shape) and 0 <= each.file < len(files)
        inside = all(
            0 <= first and 0 < count and first + count <= length
            for first, count, length in zip(each.start, each.size, entry.shape)
        )
        if not fits or not inside:
            raise ValueError(f"a slice of {key} {list(entry.shape)} lies at {list(each.start)}, {list(each.size)}")
        num += numel_of(each.size)
    if num != numel_of(entry.shape):
        raise ValueError(f"the slices of {key} have {num} elements together, the tensor {numel_of(entry.shape)}")


def numel_of(shape: tuple[int, ...]) -> int:
    """Elements of a shape; 1 of a scalar's."""
    number = 1
    for length in shape:
        number *= length
    return number
