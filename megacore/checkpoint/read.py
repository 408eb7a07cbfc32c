"""Reads checkpoints: any slice of any tensor, verified before it is believed."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.checkpoint.find import newest
from megacore.checkpoint.formats import bytes_of, dtype_of
from megacore.checkpoint.manifest import MANIFEST, Manifest, SliceEntry, TensorEntry, hash_of, numel_of, read_manifest
from megacore.checkpoint.parts import Part, overlap
from megacore.checkpoint.store import Store, open_store
from megacore.config.load import from_tree
from megacore.config.schema import ModelConfig, RunConfig

WEIGHTS = "weights/"
"""What the keys of weights begin with."""

MAX_THREADS = 8


@dataclass(frozen=True)
class _Task:
    """A slice to be read, and the parts that want some of it."""

    key: str
    entry: SliceEntry
    parts: tuple[Part, ...]


class Checkpoint:
    """A checkpoint's folder. It is a ``WeightSource``, too: weights are read by their global names."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self._headers: set[int] = set()

    @classmethod
    def of(cls, store: Store) -> "Checkpoint":
        """The checkpoint in a folder. Raises ValueError where it is not whole."""
        return cls(store, read_manifest(store))

    @classmethod
    def open(cls, path: str) -> "Checkpoint":
        """A checkpoint's folder, or the newest whole one of a run's folder or of its `checkpoints`.

        Raises ValueError where there is none.
        """
        store = open_store(path)
        return cls.of(store if MANIFEST in store.names() else newest(store))

    @property
    def what(self) -> str:
        return f"the checkpoint {self.store.describe()}"

    @cached_property
    def config(self) -> RunConfig:
        """The resolved run that was saved."""
        return from_tree(self.manifest.config, self.what)

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @cached_property
    def attachments(self) -> Mapping[str, bytes]:
        found = {}
        for name, entry in self.manifest.attachments.items():
            found[name] = self.store.read(entry.file)
            if hash_of(found[name]) != entry.hash:
                raise ValueError(f"{self.store.describe()}/{entry.file} ({name}) was damaged: its hash differs")
        return MappingProxyType(found)

    def names(self) -> list[str]:
        """The weights' global names."""
        return [key.removeprefix(WEIGHTS) for key in self.manifest.tensors if key.startswith(WEIGHTS)]

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(self.entry(WEIGHTS + name).dtype)

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        return self.read_key(WEIGHTS + name, start, size)

    def entry(self, key: str) -> TensorEntry:
        """What the manifest says of a tensor. Raises ValueError where it has none of this name."""
        if key not in self.manifest.tensors:
            raise ValueError(f"{self.what} has no {key}")
        return self.manifest.tensors[key]

    def read_key(self, key: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """[*size] of any tensor from ``start`` on, as stored."""
        entry = self.entry(key)
        out = torch.empty(tuple(size), dtype=dtype_of(entry.dtype))
        if out.numel():
            self.load([Part(key, entry.shape, tuple(start), tuple(size), out)])
        return out

    def load(self, parts: Iterable[Part], num_threads: int | None = None) -> None:
        """Fill parts, converting formats where they differ; every slice is read once and held against its hash.

        Raises ValueError that names the file which was damaged, or the tensor that is not there.
        """
        tasks = list(self._tasks(parts))
        number = num_threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._check_headers({task.entry.file for task in tasks})
        with ThreadPoolExecutor(number, thread_name_prefix="load") as pool:
            for _ in pool.map(self._read, tasks):
                pass

    def verify(self) -> None:
        """Read every byte. Raises ValueError that names the first file which was damaged."""
        self._check_headers(range(len(self.manifest.files)))
        tasks = [_Task(key, each, ()) for key, entry in self.manifest.tensors.items() for each in entry.slices]
        with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
            for _ in pool.map(self._read, tasks):
                pass
        self.__dict__.pop("attachments", None)
        assert self.attachments is not None

    def _tasks(self, parts: Iterable[Part]) -> Iterable[_Task]:
        """In the order of files and offsets."""
        wanted: dict[str, list[Part]] = {}
        for part in parts:
            wanted.setdefault(part.key, []).append(part)
        tasks = []
        for key, of_key in wanted.items():
            entry = self.entry(key)
            found = dict.fromkeys(range(len(of_key)), 0)
            for part in of_key:
                if part.shape != entry.shape:
                    raise ValueError(f"{key} has shape {list(entry.shape)} in {self.what}, here {list(part.shape)}")
            for each in entry.slices:
                takers = []
                for number, part in enumerate(of_key):
                    if common := overlap((each.start, each.size), (part.start, part.size)):
                        found[number] += numel_of(common[1])
                        takers.append(part)
                if takers:
                    tasks.append(_Task(key, each, tuple(takers)))
            for number, part in enumerate(of_key):
                if found[number] != numel_of(part.size):
                    raise ValueError(f"{self.what} does not hold all of {key} from {list(part.start)} on")
        return sorted(tasks, key=lambda task: (task.entry.file, task.entry.offset))

    def _read(self, task: _Task) -> None:
        """One slice: right into its place where that is possible, else by way of a copy."""
        entry, dtype = task.entry, dtype_of(self.entry(task.key).dtype)
        first = task.parts[0] if task.parts else None
        direct = (
            first is not None
            and len(task.parts) == 1
            and first.is_plain
            and first.dtype == dtype
            and (first.start, first.size) == (entry.start, entry.size)
        )
        data = first.tensor if first is not None and direct else torch.empty(entry.size, dtype=dtype)
        buffer = bytes_of(data)
        file = self.manifest.files[entry.file]
        self.store.read_into(file.name, entry.offset, buffer)
        if hash_of(buffer) != entry.hash:
            raise ValueError(
                f"{self.store.describe()}/{file.name} was damaged: {task.key} at bytes {entry.offset} to "
                f"{entry.offset + len(buffer)} does not have its hash"
            )
        for part in () if direct else task.parts:
            common = overlap((entry.start, entry.size), (part.start, part.size))
            assert common is not None, (part, entry)
            place = tuple(slice(at - own, at - own + n) for at, own, n in zip(common[0], entry.start, common[1]))
            part.fill(common[0], data[place])

    def _check_headers(self, files: Iterable[int]) -> None:
        for number in files:
            if number in self._headers:
                continue
            entry = self.manifest.files[number]
            data = bytearray(entry.header_size)
            self.store.read_into(entry.name, 0, memoryview(data))
            if hash_of(memoryview(data)) != entry.header_hash:
                raise ValueError(f"{self.store.describe()}/{entry.name} was damaged: its header does not have its hash")
            self._headers.add(number)
