"""Writes checkpoints: safetensors files, slice by slice, and the manifest that makes them one."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from megacore import __version__
from megacore.checkpoint.formats import NAMES, bytes_of
from megacore.checkpoint.manifest import (
    MANIFEST,
    AttachmentEntry,
    FileEntry,
    Manifest,
    SliceEntry,
    TensorEntry,
    hash_of,
    read_manifest,
)
from megacore.checkpoint.parts import MAX_SLICE_BYTES
from megacore.checkpoint.store import Store
from megacore.config.schema import RunConfig
from megacore.config.secrets import without_secrets


@dataclass(frozen=True)
class Planned:
    """A slice ``[start, start + size)`` of the global tensor ``key`` that is going to be written."""

    key: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        return prod(self.size) * self.dtype.itemsize

    @property
    def name(self) -> str:
        """As other programs that read safetensors see it: KEY[0:4,0:64]."""
        ranges = ",".join(f"{start}:{start + size}" for start, size in zip(self.start, self.size))
        return f"{self.key}[{ranges}]"


@dataclass(frozen=True)
class WrittenFile:
    """A file that is whole: what its slices are, where they begin, and their hashes."""

    entry: FileEntry
    slices: tuple[tuple[Planned, int, str], ...]


def slices_of(key: str, shape: Sequence[int], dtype: torch.dtype, max_bytes: int = MAX_SLICE_BYTES) -> list[Planned]:
    """A whole tensor cut along dim 0 into slices of at most so many bytes, as far as rows allow."""
    shape = tuple(shape)
    if not shape:
        return [Planned(key, shape, (), (), dtype)]
    rows = max(1, max_bytes // max(1, prod(shape[1:]) * dtype.itemsize))
    rest = (0,) * (len(shape) - 1)
    return [
        Planned(key, shape, (row, *rest), (min(rows, shape[0] - row), *shape[1:]), dtype)
        for row in range(0, shape[0], rows)
    ]


def write_file(store: Store, name: str, planned: Sequence[Planned], tensors: Iterable[Tensor]) -> WrittenFile:
    """Write a safetensors file; ``tensors`` come in the order of ``planned``, contiguous, on the CPU, one at a time.

    When it returns the file is durable. Raises OSError, as of a full disk.
    """
    header, begins = _header(planned)
    slices = []
    sink = store.create(name)
    try:
        sink.write(header)
        for plan, begin, tensor in zip(planned, begins, tensors, strict=True):
            assert (tensor.numel(), tensor.dtype) == (prod(plan.size), plan.dtype), (plan, tensor.shape, tensor.dtype)
            data = bytes_of(tensor)
            sink.write(data)
            slices.append((plan, len(header) + begin, hash_of(data)))
        sink.close()
    except BaseException:
        sink.abandon()
        raise
    size = len(header) + sum(plan.num_bytes for plan in planned)
    return WrittenFile(FileEntry(name, size, len(header), hash_of(header)), tuple(slices))


def commit(
    store: Store,
    written: Sequence[WrittenFile],
    *,
    kind: str,
    step: int,
    config: RunConfig,
    layout: Mapping[str, int],
    state: Mapping[str, Any],
    attachments: Mapping[str, bytes],
) -> Manifest:
    """Make the files in a folder a checkpoint: write the small ones, and then, at once and for good, the manifest."""
    entries = {}
    for number, (name, data) in enumerate(sorted(attachments.items())):
        entries[name] = AttachmentEntry(f"attachment-{number}", len(data), hash_of(data))
        sink = store.create(entries[name].file)
        sink.write(data)
        sink.close()
    made = {"megacore": __version__, "torch": torch.__version__, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    files = tuple(each.entry for each in written)
    tensors = _gathered(written)
    manifest = Manifest(kind, step, asdict(without_secrets(config)), layout, state, tensors, files, entries, made)
    data = manifest.to_bytes()
    # What cannot be read back is not a checkpoint: a slice that no rank wrote is noticed here.
    Manifest.from_bytes(data, f"the manifest of {store.describe()}")
    store.replace(MANIFEST, data)
    return manifest


def amend(store: Store, state: Mapping[str, Any]) -> None:
    """Give a checkpoint another ``state``: its manifest is exchanged at once, all else stays as it is.

    Raises ValueError where it is not whole, OSError as usual; the old manifest then stands.
    """
    data = replace(read_manifest(store), state=state).to_bytes()
    Manifest.from_bytes(data, f"the manifest of {store.describe()}")
    store.replace(MANIFEST, data)


def _header(planned: Sequence[Planned]) -> tuple[bytes, list[int]]:
    """A safetensors header, its length in front, and where each slice begins behind it."""
    table: dict[str, Any] = {"__metadata__": {"format": "megacore"}}
    begins, begin = [], 0
    for plan in planned:
        end = begin + plan.num_bytes
        table[plan.name] = {"dtype": NAMES[plan.dtype], "shape": plan.size, "data_offsets": (begin, end)}
        begins.append(begin)
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins


def _gathered(written: Sequence[WrittenFile]) -> dict[str, TensorEntry]:
    slices: dict[str, list[SliceEntry]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for number, file in enumerate(written):
        for plan, offset, digest in file.slices:
            kind = (NAMES[plan.dtype], plan.shape)
            if kinds.setdefault(plan.key, kind) != kind:
                raise ValueError(f"{plan.key} is {kind} on one rank and {kinds[plan.key]} on another")
            slices.setdefault(plan.key, []).append(SliceEntry(number, offset, plan.start, plan.size, digest))
    return {
        key: TensorEntry(*kinds[key], tuple(sorted(entries, key=lambda each: each.start)))
        for key, entries in slices.items()
    }
