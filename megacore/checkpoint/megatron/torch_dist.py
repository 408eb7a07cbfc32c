"""Checkpoints of Megatron-Core's dist_checkpointing (--ckpt-format torch_dist): global tensors in `.distcp` files.

    iter_0000100/metadata.json      {"sharded_backend": "torch_dist"}
                 .metadata          a pickle: each tensor's shape and chunks, and in which bytes of which file these lie
                 __0_0.distcp, ...  at those bytes, a chunk as torch.save writes it
                 common.pt          the settings; newer versions have them as an object in the files, common_state

Names are those of Megatron-Core with norms fused into the matrix behind them, and either with the layer's number or
with all layers in one tensor, its dim 0. A gated linear_fc1 is [gate; up] over all ranks, or two tensors `_w` and `_v`.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from megacore.checkpoint.hf.strict_json import read_object
from megacore.checkpoint.hf.tensor_files import StoredTensor
from megacore.checkpoint.megatron.archive import read_archive
from megacore.checkpoint.megatron.names import LEFT_OUT, canonical
from megacore.checkpoint.megatron.unpickle import Record, TensorNote, load
from megacore.checkpoint.megatron.whole import Part, Whole
from megacore.checkpoint.store import Store

CONFIG, INDEX, COMMON = "metadata.json", ".metadata", "common.pt"
COMMON_STATE = "common_state/shard_0_1"
HALVES = re.compile(r"(.*\.mlp\.linear_fc1\.(?:weight|bias))_([wv])")
Key = tuple[str, tuple[int, ...]]
"""Name and beginning of a chunk; objects begin nowhere."""

STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")


@dataclass(frozen=True)
class TorchDist:
    """``args`` as saved, and all ``tensors`` by canonical name, layers numbered."""

    args: Record
    tensors: Mapping[str, Whole]


@dataclass(frozen=True)
class _Bytes:
    """Where an object lies."""

    file: str
    offset: int
    length: int


def is_torch_dist(store: Store) -> bool:
    """Whether a folder has the marks of such a checkpoint, or of another format of the same family."""
    return CONFIG in store.names() or INDEX in store.names()


def read_torch_dist(store: Store) -> TorchDist:
    """Read the index and the settings; the numbers stay where they are.

    Raises ValueError for other formats, and for an index that does not fit the files.
    """
    names = store.names()
    where = store.describe()
    if CONFIG in names:
        backend = read_object(store.read(CONFIG), f"{where}/{CONFIG}").get("sharded_backend")
        if backend != "torch_dist":
            raise ValueError(f"{where} is of format {backend!r}; supported are torch_dist and torch (legacy)")
    if INDEX not in names:
        raise ValueError(f"{where} has no {INDEX}: it is not whole, or was never finished")
    data = store.read(INDEX)
    index = load(io.BytesIO(data), len(data), f"{where}/{INDEX}")
    entries, places = (_fields(index, f"{where}/{INDEX}").get(key) for key in ("state_dict_metadata", "storage_data"))
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise ValueError(f"{where}/{INDEX} has no list of tensors and their places")
    located = dict(_places(places, f"{where}/{INDEX}"))
    _check_files(store, names, located)
    return TorchDist(_arguments(store, names, located), dict(_wholes(store, entries, located)))


def _places(places: Mapping[Any, Any], what: str) -> Iterator[tuple[Key, _Bytes]]:
    for key, value in places.items():
        of, at = _fields(key, what), _fields(value, what)
        file, offset, length = (at.get(name) for name in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", file):
            raise ValueError(f"{what} names {file!r}, which is not the name of a file in this folder; such are refused")
        if type(offset) is not int or type(length) is not int or not isinstance(of.get("fqn"), str):
            raise ValueError(f"{what} has no bytes for {of.get('fqn')!r}")
        if at.get("transform_descriptors"):
            raise ValueError(f"{what}: {of['fqn']} is stored transformed (compressed?), which is not supported")
        yield (of["fqn"], tuple(of.get("offset") or ())), _Bytes(file, offset, length)


def _arguments(store: Store, names: list[str], located: Mapping[Key, _Bytes]) -> Record:
    where = store.describe()
    if COMMON in names:
        common = read_archive(store, COMMON).value
    elif (COMMON_STATE, ()) in located:
        at = located[COMMON_STATE, ()]
        common = read_archive(store, at.file, at.offset, at.length).value
        common = common[0] if isinstance(common, list) and common else common
    else:
        raise ValueError(f"{where} has neither {COMMON} nor common_state: the settings of its run are not there")
    args = common.get("args") if isinstance(common, dict) else None
    if not isinstance(args, Record) or args.origin != "argparse.Namespace":
        raise ValueError(f"{where} has no args, the settings of the run that saved it, and cannot be read alone")
    return args


def _wholes(store: Store, entries: Mapping[Any, Any], located: Mapping[Key, _Bytes]) -> Iterator[tuple[str, Whole]]:
    halves: dict[str, dict[str, Whole]] = {}
    for key, entry in entries.items():
        if not isinstance(key, str) or LEFT_OUT.search(key) or not _is_tensor(entry):
            continue
        whole = _whole(store, key, entry, located)
        for name, each in _layers(key, whole):
            if match := HALVES.fullmatch(name):
                halves.setdefault(match[1], {})[match[2]] = each
            else:
                yield canonical(name), each
    for name, pair in halves.items():
        if pair.keys() != {"w", "v"} or pair["w"].shape != pair["v"].shape:
            raise ValueError(f"{store.describe()}: {name} is not whole: its two halves are not there or not alike")
        gate, up = pair["w"], pair["v"]
        rows = gate.shape[0]
        shape = (2 * rows, *gate.shape[1:])
        yield canonical(name), replace(gate, shape=shape, parts=(*gate.parts, *up.moved(rows))).check()


def _layers(key: str, whole: Whole) -> Iterator[tuple[str, Whole]]:
    """A tensor of all layers as one of each; others as they are."""
    match = STACKED.fullmatch(key)
    if match is None:
        yield key, whole
        return
    for number in range(whole.shape[0]):
        yield f"decoder.layers.{number}.{match[1]}", whole.layer(number, f"layer {number} of {whole.what}")


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, Record) and entry.origin.endswith(".TensorStorageMetadata")


def _whole(store: Store, key: str, entry: Record, located: Mapping[Key, _Bytes]) -> Whole:
    what = f"{key} in {store.describe()}"
    fields = entry.fields
    shape, dtype, chunks = (
        _sizes(fields.get("size"), what),
        _format(fields.get("properties"), what),
        fields.get("chunks"),
    )
    if not isinstance(chunks, list):
        raise ValueError(f"{what} has no chunks")
    parts = []
    for chunk in chunks:
        start, size = (_sizes(_fields(chunk, what).get(name), what) for name in ("offsets", "sizes"))
        at = located.get((key, start))
        if at is None:
            raise ValueError(f"{what} is not whole: its chunk at {list(start)} is in no file")
        parts.append(Part(start, size, (0,) * len(shape), cache(partial(_chunk, store, at, size, what))))
    return Whole(what, shape, dtype, tuple(parts)).check()


def _chunk(store: Store, at: _Bytes, size: tuple[int, ...], what: str) -> StoredTensor:
    archive = read_archive(store, at.file, at.offset, at.length)
    if not isinstance(archive.value, TensorNote) or archive.value.shape != size:
        raise ValueError(f"{archive.what} is not the chunk of {what} with shape {list(size)} that the index promises")
    return archive.locate(archive.value, what)


def _check_files(store: Store, names: Sequence[str], located: Mapping[Key, _Bytes]) -> None:
    if missing := sorted({at.file for at in located.values()} - set(names)):
        raise ValueError(f"{store.describe()} has no {missing[0]}; the checkpoint is not whole")


def _fields(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Record):
        raise ValueError(f"{what} is no index of torch.distributed.checkpoint")
    return value.fields


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(each) is int and 0 <= each < 1 << 48 for each in value):
        raise ValueError(f"{what} has the shape or place {value!r}")
    return value


def _format(properties: Any, what: str) -> torch.dtype:
    state = properties.state if isinstance(properties, Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else _fields(properties, what).get("dtype")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{what} has no format of numbers")
    return dtype
