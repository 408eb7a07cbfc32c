"""Writes weights as a checkpoint of ours: from any source, slice by slice, so that nothing is ever held whole."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megacore.checkpoint.hf.export import DTYPES, converted
from megacore.checkpoint.manifest import MANIFEST
from megacore.checkpoint.manifest import WEIGHTS as KIND
from megacore.checkpoint.pool import Report, do_all, workers_for
from megacore.checkpoint.read import WEIGHTS
from megacore.checkpoint.source import WeightSource
from megacore.checkpoint.store import Store, open_store
from megacore.checkpoint.write import Planned, WrittenFile, commit, slices_of, write_file
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig, TrainConfig
from megacore.spec import ModelSpec

FILE_BYTES = 1 << 30
OURS = re.compile(re.escape(MANIFEST) + r"|weights-\d+\.safetensors|attachment-\d+")


@dataclass(frozen=True)
class Imported:
    """What was written."""

    folder: str
    files: int
    num_params: int
    num_bytes: int


@dataclass(frozen=True)
class _Job:
    """All that a worker must know to write one file."""

    open: Callable[[], WeightSource]
    folder: str
    file: str
    planned: tuple[Planned, ...]


def write_checkpoint(
    source: WeightSource,
    folder: str,
    dtype: str = "keep",
    *,
    reopen: Callable[[], WeightSource],
    num_workers: int = 0,
    force: bool = False,
    report: Callable[[int, int], Any] = lambda done, total: None,
) -> Imported:
    """Write weights as a checkpoint that holds nothing else, from which `checkpoint.init_from` and exports start.

    ``reopen``, which must be picklable, opens the source in another process; ``num_workers`` 0: as many as are worth
    it. ``dtype``: keep, fp32, bf16 or fp16. ``report`` is told bytes done and in total. The folder is a checkpoint only
    once all is there.

    Raises ValueError for a folder that is not empty, unless ``force``: then an older checkpoint there is replaced.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    store = open_store(folder)
    _clear(store, folder, force)
    planned = [
        plan
        for param in ModelSpec.of(source.model).params
        for plan in slices_of(WEIGHTS + param.name, param.shape, DTYPES[dtype] or source.dtype(param.name))
    ]
    total, done = sum(plan.num_bytes for plan in planned), 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    told(0)
    num_workers = workers_for(total, num_workers)
    files = _dealt(planned, min(FILE_BYTES, -(-total // num_workers)))
    jobs = [_Job(reopen, folder, f"weights-{n:05d}.safetensors", group) for n, group in enumerate(files)]
    written = do_all(_write, jobs, num_workers, told)
    run = RunConfig(model=source.model, train=TrainConfig(seq_len=source.model.max_positions or 1))
    commit(
        store,
        written,
        kind=KIND,
        step=0,
        config=resolve(run, 1),
        layout={},
        state={},
        attachments=source.attachments,
    )
    return Imported(folder, len(files), ModelSpec.of(source.model).num_params, total)


def _clear(store: Store, folder: str, force: bool) -> None:
    names = store.names()
    present = [*names, *store.folders()]
    if present and not force:
        raise ValueError(f"{folder} is not empty ({present[0]}, ...); name another folder, or use --force")
    for name in sorted((each for each in names if OURS.fullmatch(each)), key=lambda each: each != MANIFEST):
        store.remove(name)


def _dealt(planned: Sequence[Planned], file_bytes: int) -> list[tuple[Planned, ...]]:
    """In order, to files of about so many bytes."""
    groups: list[list[Planned]] = [[]]
    held = 0
    for plan in planned:
        if groups[-1] and held + plan.num_bytes > file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(plan)
        held += plan.num_bytes
    return [tuple(group) for group in groups]


def _write(job: _Job, report: Report) -> WrittenFile:
    source = job.open()

    def tensors() -> Any:
        for plan in job.planned:
            name = plan.key.removeprefix(WEIGHTS)
            yield converted(source.read(name, plan.start, plan.size), plan.dtype, name)
            report(plan.num_bytes)

    return write_file(open_store(job.folder), job.file, job.planned, tensors())
