"""Writes weights as an HF folder: from any source, slice by slice, so that nothing is ever held whole."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megacore.checkpoint.formats import NAMES, bytes_of
from megacore.checkpoint.hf.destination import Destination
from megacore.checkpoint.hf.family import Family, family_for
from megacore.checkpoint.hf.files import CONFIG, GENERATION, INDEX, WEIGHTS
from megacore.checkpoint.hf.folder import original
from megacore.checkpoint.hf.placement import Placements, Run
from megacore.checkpoint.hf.same_tokenizer import check_export
from megacore.checkpoint.hf.strict_json import write_object
from megacore.checkpoint.hf.tokenizer import tokenizer_files
from megacore.checkpoint.pool import Report, do_all, workers_for
from megacore.checkpoint.source import WeightSource
from megacore.checkpoint.store import Store, open_store
from megacore.config.schema import ModelConfig, RunConfig

SHARD_BYTES = 5 * 10**9
"""Of a file, as HF's own have it."""

SLICE_BYTES = 1 << 26
"""Read, converted and written at once."""

DTYPES: Mapping[str, torch.dtype | None] = MappingProxyType(
    {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)


@dataclass(frozen=True)
class Exported:
    """What was written, and what the user should know of it."""

    folder: str
    model_type: str
    files: int
    num_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """A file to be written: its tensors' names, shapes and formats, in order. Bytes are those of their numbers."""

    file: str
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]

    @property
    def num_bytes(self) -> int:
        return sum(prod(shape) * dtype.itemsize for _, shape, dtype in self.tensors)


@dataclass(frozen=True)
class _Job:
    """All that a worker must know to write one file."""

    open: Callable[[], WeightSource]
    folder: str
    shard: Shard
    vocab_rows: int


def export(
    source: WeightSource,
    folder: str,
    dtype: str = "keep",
    *,
    shard_bytes: int = SHARD_BYTES,
    pad_vocab_multiple: int = 1,
    reopen: Callable[[], WeightSource] | None = None,
    num_workers: int = 0,
    force: bool = False,
    report: Callable[[int, int], Any] = lambda done, total: None,
) -> Exported:
    """Write weights as an HF folder.

    ``dtype``: keep, fp32, bf16 or fp16. The vocabulary's tensors get rows of zeros up to a multiple of
    ``pad_vocab_multiple``. ``reopen``, which must be picklable, opens the source in another process: several
    ``num_workers`` need it (0: as many as are worth it). ``report`` is told bytes done and in total.

    The folder appears whole or not at all (in an object store: config.json comes last). Raises ValueError for a model
    that no family of HF can say, and for a folder that is not empty, unless ``force``.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if pad_vocab_multiple < 1 or shard_bytes < 1:
        raise ValueError(f"--pad-vocab-multiple {pad_vocab_multiple} and --shard-size {shard_bytes} must be at least 1")
    check_export(source)
    destination = Destination(folder, force)
    family, model = family_for(source.model)
    vocab_rows = -(-model.vocab_size // pad_vocab_multiple) * pad_vocab_multiple
    placements = Placements.make(family.forms, model, vocab_rows)
    stored = {name: DTYPES[dtype] or source.dtype(place.param.name) for name, place in placements.parts.items()}
    shards = shards_of(placements.shapes, stored, shard_bytes)
    total, done = sum(shard.num_bytes for shard in shards), 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    told(0)
    jobs = [_Job(reopen or partial(_itself, source), destination.work, shard, vocab_rows) for shard in shards]
    do_all(_write, jobs, workers_for(total, num_workers) if reopen else 1, told)

    main_dtype = str(next(iter(stored.values()))).removeprefix("torch.")
    last, notes = _small_files(source, family, model, vocab_rows, main_dtype)
    if len(shards) > 1:
        last = {INDEX: write_object(_index(shards)), **last}
    destination.finish([shard.file for shard in shards], last)
    if family.ours != source.model.family:
        notes.append(f"what model.family={source.model.family} has here is {family.model_type} in HF's words")
    return Exported(folder, family.model_type, len(shards), total, tuple(notes))


def _small_files(
    source: WeightSource, family: Family, model: ModelConfig, vocab_rows: int, dtype: str
) -> tuple[dict[str, bytes], list[str]]:
    """All but the weights, config.json last; and what the user should know."""
    run = getattr(source, "config", None)
    name = run.data.tokenizer if isinstance(run, RunConfig) else ""
    tokenizer = tokenizer_files(source.attachments, name)
    before = original(source.attachments, CONFIG)
    generation = original(source.attachments, GENERATION)
    if before.get("model_type") != family.model_type:
        before, generation = {}, dict(tokenizer.ids)
    config = family.merge(model, before, tokenizer.ids, vocab_rows, dtype)
    last = dict(tokenizer.files)
    if generation:
        last[GENERATION] = write_object(generation)
    return {**last, CONFIG: write_object(config)}, list(tokenizer.notes)


def shards_of(
    shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype], shard_bytes: int
) -> tuple[Shard, ...]:
    """Tensors dealt in order to files of at most so many bytes; one that is larger is alone."""
    groups: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtypes[name].itemsize
        if groups[-1] and held + size > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append((name, tuple(shape), dtypes[name]))
        held += size
    if len(groups) == 1:
        return (Shard(WEIGHTS, tuple(groups[0])),)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )


def _index(shards: Sequence[Shard]) -> dict[str, Any]:
    tensors = [(name, shape, shard.file) for shard in shards for name, shape, _ in shard.tensors]
    return {
        "metadata": {
            "total_parameters": sum(prod(shape) for _, shape, _ in tensors),
            "total_size": sum(shard.num_bytes for shard in shards),
        },
        "weight_map": {name: file for name, _, file in sorted(tensors)},
    }


def _itself(source: WeightSource) -> WeightSource:
    return source


def _write(job: _Job, report: Report) -> None:
    """One file."""
    source = job.open()
    family, model = family_for(source.model)
    placements = Placements.make(family.forms, model, job.vocab_rows)
    write_shard(open_store(job.folder), job.shard, source, placements, report)


def write_shard(store: Store, shard: Shard, source: WeightSource, placements: Placements, report: Report) -> None:
    """Write a safetensors file of HF's tensors. When it returns the file is durable."""
    sink = store.create(shard.file)
    try:
        sink.write(_header(shard))
        for name, shape, dtype in shard.tensors:
            step = max(1, SLICE_BYTES // max(1, prod(shape[1:]) * dtype.itemsize))
            for first in range(0, shape[0], step):
                rows = read_theirs(source, placements, name, first, min(step, shape[0] - first))
                data = bytes_of(converted(rows, dtype, name))
                sink.write(data)
                report(len(data))
    except BaseException:
        sink.abandon()
        raise
    sink.close()


def read_theirs(source: WeightSource, placements: Placements, tensor: str, first: int, count: int) -> Tensor:
    """Rows ``[first, first + count)`` of an HF tensor, made of our parameters; contiguous, as stored."""
    place, shape = placements.parts[tensor], placements.shapes[tensor]
    name = place.param.name
    runs = [run for run in place.runs if run.tensor == tensor]
    if place.transposed:  # rows of theirs are columns of ours
        blocks = [source.read(name, (run.ours, first), (run.size, count)) for run in runs]
        return torch.cat(blocks).T.contiguous()
    clipped = [part for run in runs if (part := run.of_theirs(first, count)) is not None]
    rest = shape[1:]
    if len(clipped) == 1 and clipped[0].size == count:
        return source.read(name, (clipped[0].ours, *(0 for _ in rest)), (count, *rest))
    out = torch.zeros((count, *rest), dtype=source.dtype(name))  # rows of padding stay so
    for group in _neighbours(clipped):
        start, size = group[0].ours, sum(run.size for run in group)
        block = source.read(name, (start, *(0 for _ in rest)), (size, *rest))
        for run in group:
            at = run.theirs - first
            out[at : at + run.size] = block[run.ours - start : run.ours - start + run.size]
    return out


def _neighbours(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs that follow each other in ours, read at once: what is stored may be whole only in large slices."""
    group: list[Run] = []
    for run in sorted(runs, key=lambda each: each.ours):
        if group and group[-1].ours + group[-1].size != run.ours:
            yield group
            group = []
        group.append(run)
    if group:
        yield group


def converted(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``rows`` in another format; ``name`` is for messages. Raises ValueError where fp16 is too short for a number."""
    converted = rows.to(dtype)
    if dtype is torch.float16 and not converted.isfinite().all() and rows.isfinite().all():
        raise ValueError(f"{name} holds {rows.abs().max().item():.6g}, more than fp16 can; use --dtype bf16")
    return converted


def _header(shard: Shard) -> bytes:
    """A safetensors header, its length in front."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape, dtype in shard.tensors:
        end = begin + prod(shape) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
