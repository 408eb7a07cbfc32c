"""Legacy checkpoints of Megatron-LM (--ckpt-format torch): a file for each tensor- and pipeline-parallel rank.

    iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt    {"args", "model" or "model0", "model1", ...: {name: tensor}}

Each rank has its slice of a matrix: of rows (a column-parallel layer), of columns (row-parallel), or all of it. With a
gated MLP a rank's linear_fc1 is its gate's rows, then its up projection's. Layers are numbered within each stage.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megacore.checkpoint.megatron.archive import Archive, read_archive
from megacore.checkpoint.megatron.names import FC1, LEFT_OUT, canonical
from megacore.checkpoint.megatron.unpickle import Record, TensorNote
from megacore.checkpoint.megatron.whole import Part, Whole
from megacore.checkpoint.store import Store

RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(_\d\d\d)?")
FILES = ("model_optim_rng.pt", "model_rng.pt")
SPLIT_ROWS = re.compile(rf"(linear_qkv|{re.escape(FC1)})\.(weight|bias)$|^embedding\.word_embeddings\.|^output_layer\.")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
SPLIT_COLUMNS = re.compile(r"(linear_proj|linear_fc2)\.weight$")
VERSIONS = (2.0, 3.0)
"""Of the order of rows in linear_qkv: head after head, of each group its queries, its key and its value."""


@dataclass(frozen=True)
class Legacy:
    """``args`` as saved, and for each stage, in order, its tensors on each tensor-parallel rank by canonical name."""

    args: Record
    stages: tuple[tuple[Mapping[str, tuple[Archive, TensorNote]], ...], ...]

    @property
    def num_layers(self) -> int:
        """Found in all stages."""
        return sum(_layers(ranks[0]) for ranks in self.stages)

    def wholes(self, gated: bool) -> Iterator[tuple[str, Whole]]:
        """All tensors with layers numbered through; ``gated``: linear_fc1 is gate and up projection.

        A tied output matrix is the last stage's copy of the embedding. Raises ValueError where ranks do not fit.
        """
        offset = 0
        for ranks in self.stages:
            for name in ranks[0]:
                if any(name not in rank for rank in ranks):
                    raise ValueError(f"{ranks[0][name][0].what} has {name}, which another tensor-parallel rank lacks")
                whole_name = _renumbered(name, offset)
                found = [rank[name][0].locate(rank[name][1], name) for rank in ranks]
                yield whole_name, _merged(ranks[0][name][0].what, whole_name, found, gated)
            offset += _layers(ranks[0])


def is_legacy(store: Store) -> bool:
    """Whether a folder has files of ranks."""
    return any(RANK.fullmatch(name) for name in store.folders())


def read_legacy(store: Store) -> Legacy:
    """Read the pickles of all ranks, one after the other; the numbers stay where they are.

    Raises ValueError for ranks that are missing, and for what is not such a checkpoint.
    """
    folders: dict[tuple[int, int], str] = {}
    for name in store.folders():
        if match := RANK.fullmatch(name):
            if match[3] or (int(match[1]), int(match[2] or 0)) in folders:
                raise ValueError(f"{store.describe()}/{name} is of an expert-parallel rank; experts are not supported")
            folders[int(match[1]), int(match[2] or 0)] = name
    num_tp, num_pp = (1 + max(rank[axis] for rank in folders) for axis in (0, 1))
    if missing := [(t, p) for t in range(num_tp) for p in range(num_pp) if (t, p) not in folders]:
        raise ValueError(f"{store.describe()} has no mp_rank_{missing[0][0]:02d}_{missing[0][1]:03d}: it is not whole")
    args: Record | None = None
    chunks: dict[tuple[int, int, int], Mapping[str, tuple[Archive, TensorNote]]] = {}
    for (t, p), folder in sorted(folders.items()):
        archive = _open(store.child(folder))
        for number, state in _models(archive):
            chunks[number, p, t] = dict(_tensors(archive, state))
        if args is None:
            args = _arguments(archive)
            _check_sizes(args, archive.what, num_tp, num_pp)
    assert args is not None
    num_chunks = 1 + max(number for number, _, _ in chunks)
    if len(chunks) != num_chunks * num_pp * num_tp:
        raise ValueError(f"{store.describe()}: not all ranks have {num_chunks} model chunks: it is not whole")
    order = [(number, p) for number in range(num_chunks) for p in range(num_pp)]
    return Legacy(args, tuple(tuple(chunks[number, p, t] for t in range(num_tp)) for number, p in order))


def _open(store: Store) -> Archive:
    names = store.names()
    for file in FILES:
        if file in names:
            return read_archive(store, file)
    raise ValueError(f"{store.describe()} has no {FILES[0]}; the checkpoint is not whole")


def _arguments(archive: Archive) -> Record:
    args = archive.value.get("args")
    if not isinstance(args, Record) or args.origin != "argparse.Namespace":
        raise ValueError(f"{archive.what} has no args, the settings of the run that saved it, and cannot be read alone")
    version = archive.value.get("checkpoint_version", 0)
    if version not in VERSIONS:
        raise ValueError(
            f"{archive.what} has checkpoint_version={version}, which orders the rows of query_key_value otherwise; "
            f"load and save it with a newer Megatron-LM. Supported are {' and '.join(map(str, VERSIONS))}"
        )
    return args


def _check_sizes(args: Record, what: str, num_tp: int, num_pp: int) -> None:
    for key, found in (("tensor_model_parallel_size", num_tp), ("pipeline_model_parallel_size", num_pp)):
        if args.fields.get(key, found) != found:
            raise ValueError(f"{what} was saved with {key}={args.fields[key]}, but there are files of {found}")


def _models(archive: Archive) -> list[tuple[int, Any]]:
    if not isinstance(archive.value, dict):
        raise ValueError(f"{archive.what} holds a {type(archive.value).__name__}, not a checkpoint of Megatron-LM")
    models = {str(key): value for key, value in archive.value.items() if re.fullmatch(r"model\d{0,3}", str(key))}
    found = [(int(key.removeprefix("model") or 0), value) for key, value in models.items()]
    if not found:
        raise ValueError(f"{archive.what} has no model; optimizer state alone is not supported")
    return found


def _tensors(archive: Archive, state: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Archive, TensorNote]]]:
    if not isinstance(state, dict):
        raise ValueError(f"{archive.what}: {prefix or 'the model'} is no dict of tensors")
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _tensors(archive, value, f"{name}.")
        elif isinstance(value, TensorNote):
            if not LEFT_OUT.search(name):
                yield canonical(name), (archive, value)
        elif value is not None and not LEFT_OUT.search(name):
            kind = value.origin if isinstance(value, Record) else type(value).__name__
            raise ValueError(f"{archive.what}: {name} is a {kind}, not a plain tensor; save the weights unquantised")


def _layers(tensors: Mapping[str, Any]) -> int:
    numbers = [int(match[1]) for name in tensors if (match := LAYER.match(name))]
    return 1 + max(numbers, default=-1)


def _renumbered(name: str, offset: int) -> str:
    """The name of a stage's tensor in the whole model, before whose layers so many others stand."""
    match = LAYER.match(name)
    return name if match is None else f"decoder.layers.{int(match[1]) + offset}.{name[match.end() :]}"


def _merged(where: str, name: str, found: list[Any], gated: bool) -> Whole:
    """A tensor of all tensor-parallel ranks' slices of it."""
    first, what = found[0], f"{name} in {where}"
    if any(each.shape != first.shape or each.dtype != first.dtype for each in found):
        raise ValueError(f"{what} has another shape or format on another tensor-parallel rank")
    zeros, size = (0,) * len(first.shape), first.shape
    here = [partial(_itself, each) for each in found]
    if SPLIT_COLUMNS.search(name):
        whole = (size[0], size[1] * len(found))
        parts = [Part((0, t * size[1]), size, zeros, stored) for t, stored in enumerate(here)]
    elif not SPLIT_ROWS.search(name):
        whole, parts = size, [Part(zeros, size, zeros, here[0])]
    else:
        whole, rest = (size[0] * len(found), *size[1:]), zeros[1:]
        halves = 2 if gated and f".{FC1}." in name else 1
        rows = size[0] // halves
        parts = [
            Part((half * rows * len(found) + t * rows, *rest), (rows, *size[1:]), (half * rows, *rest), stored)
            for half in range(halves)
            for t, stored in enumerate(here)
        ]
    return Whole(what, whole, first.dtype, tuple(parts)).check()


def _itself(value: Any) -> Any:
    return value
