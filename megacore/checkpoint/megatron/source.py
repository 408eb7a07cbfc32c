"""A checkpoint of Megatron-LM as a source of weights under our names, of which any slice is read alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megacore.checkpoint.hf.placement import VOCABULARY, Run
from megacore.checkpoint.importing import Imported, write_checkpoint
from megacore.checkpoint.megatron.arguments import is_gated, model_of
from megacore.checkpoint.megatron.legacy import is_legacy, read_legacy
from megacore.checkpoint.megatron.names import EMBEDDING, OUTPUT, reason, theirs
from megacore.checkpoint.megatron.torch_dist import is_torch_dist, read_torch_dist
from megacore.checkpoint.megatron.whole import Whole
from megacore.checkpoint.store import LocalStore, Store, open_store
from megacore.config.schema import ModelConfig
from megacore.spec import ModelSpec, ParamSpec

TRACKER = "latest_checkpointed_iteration.txt"
NUMBERS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
COMPARED_ROWS = 1 << 12


class MegatronSource:
    """A legacy or torch_dist checkpoint; it is a ``WeightSource``. Nothing in it is ever run.

    ``path``: a folder of one iteration, or the folder of all, of which the tracker file names the last.
    ``vocab_size``: the tokenizer's, where rows were added to fill up (0: as the saved settings say).
    """

    def __init__(self, path: str, vocab_size: int = 0) -> None:
        """Raises ValueError for what is not whole, not supported or not safe, naming file, setting and value."""
        self.path, self.vocab_size = path, vocab_size
        store = _folder(open_store(path))
        self.where = store.describe()
        if is_legacy(store):
            self.format = "torch"
            legacy = read_legacy(_without_links(store))
            found = legacy.wholes(is_gated(legacy.args))
            args = legacy.args
        else:
            self.format = "torch_dist"
            dist = read_torch_dist(store)
            found, args = iter(dist.tensors.items()), dist.args
        self.model: ModelConfig
        self.model, self.notes = model_of(args, self.where, vocab_size)
        self.tensors: dict[str, Whole] = {}
        for name, whole in found:
            # stages that share the embedding hold copies; the first one, of the first stage, counts
            self.tensors.setdefault(name, whole)
        self.params = {param.name: param for param in ModelSpec.of(self.model).params}
        self._check()

    @property
    def what(self) -> str:
        return f"the Megatron-LM checkpoint {self.where}"

    @property
    def attachments(self) -> Mapping[str, bytes]:
        """None: Megatron-LM keeps its tokenizer elsewhere."""
        return MappingProxyType({})

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[theirs(name)].dtype

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        whole = self.tensors[theirs(name)]
        out = torch.empty(tuple(size), dtype=whole.dtype)
        for each in _runs(self.params[name], self.model):
            run = each.of_ours(start[0], size[0])
            if run is not None:
                whole.fill((run.theirs, *start[1:]), out[run.ours - start[0] : run.ours - start[0] + run.size])
        return out

    def _check(self) -> None:
        """Every tensor that the model has is there, in its shape and a format of numbers, and no other."""
        wanted = {theirs(name): param for name, param in self.params.items()}
        extra = sorted(self.tensors.keys() - wanted.keys())
        if self.model.tie_embeddings and OUTPUT in extra:
            self._check_tied()
            extra.remove(OUTPUT)
        if extra:
            raise ValueError(f"{self.what} has {extra[0]}, for which its settings have no use{reason(extra[0])}")
        if missing := [name for name in wanted if name not in self.tensors]:
            raise ValueError(f"{self.what} lacks {missing[0]}, which a model of its settings has; it is not whole")
        for name, param in wanted.items():
            whole = self.tensors[name]
            rows_fit = whole.shape[:1] == param.shape[:1] or (
                param.name in VOCABULARY and whole.shape[:1] >= param.shape[:1]
            )
            if not rows_fit or whole.shape[1:] != param.shape[1:]:
                raise ValueError(
                    f"{self.what}: {name} has shape {list(whole.shape)}, but its settings mean {list(param.shape)}"
                )
            if whole.dtype not in NUMBERS:
                raise ValueError(
                    f"{self.what}: {name} is stored as {whole.dtype}; fp64, fp32, bf16 and fp16 are supported"
                )

    def _check_tied(self) -> None:
        """The last stage's copy of the embedding must be that to the last bit."""
        own, copy = self.tensors[EMBEDDING], self.tensors[OUTPUT]
        same = own.shape == copy.shape and own.dtype == copy.dtype
        for row in range(0, own.shape[0] if same else 0, COMPARED_ROWS):
            size = (min(COMPARED_ROWS, own.shape[0] - row), *own.shape[1:])
            blocks = [torch.empty(size, dtype=own.dtype) for _ in range(2)]
            for whole, block in zip((own, copy), blocks):
                whole.fill((row, 0), block)
            same = same and torch.equal(*blocks)
        if not same:
            raise ValueError(
                f"{self.what}: {OUTPUT} is not the embedding, though untie_embeddings_and_output_weights is not set"
            )


def import_megatron(
    source: str,
    target: str,
    dtype: str = "keep",
    *,
    vocab_size: int = 0,
    num_workers: int = 1,
    force: bool = False,
    report: Callable[[int, int], Any] = lambda done, total: None,
) -> tuple[MegatronSource, Imported]:
    """Write the weights of a Megatron-LM checkpoint as one of ours; arguments as of `write_checkpoint`.

    What was read, and what was written. Raises ValueError as `MegatronSource` and `write_checkpoint` do.
    """
    reopen = partial(MegatronSource, source, vocab_size)
    opened = reopen()
    done = write_checkpoint(opened, target, dtype, reopen=reopen, num_workers=num_workers, force=force, report=report)
    return opened, done


def _runs(param: ParamSpec, model: ModelConfig) -> list[Run]:
    """Where our rows lie among theirs: the same, but of linear_qkv, which has for each group of heads its queries, its
    key and its value."""
    if ".attention.qkv." not in param.name:
        return [Run("", 0, 0, param.shape[0])]
    heads, groups, d = model.num_heads, model.num_kv_heads, model.head_dim
    share = heads // groups
    runs = [Run("", g * (share + 2) * d, g * share * d, share * d) for g in range(groups)]
    for part in range(2):
        row = heads + part * groups
        runs += [Run("", (g * (share + 2) + share + part) * d, (row + g) * d, d) for g in range(groups)]
    return runs


def _folder(store: Store) -> Store:
    """The folder of one iteration: the store itself, or the one that its tracker file names."""
    if is_legacy(store) or is_torch_dist(store):
        return store
    where = store.describe()
    if TRACKER not in store.names():
        raise ValueError(
            f"{where} is no checkpoint of Megatron-LM: it has neither {TRACKER} nor mp_rank_XX folders nor .metadata"
        )
    word = store.read(TRACKER).decode(errors="replace").strip()
    if word != "release" and not (word.isascii() and word.isdigit() and len(word) < 12):
        raise ValueError(f"{where}/{TRACKER} says {word[:40]!r}, which is neither release nor an iteration")
    name = word if word == "release" else f"iter_{int(word):07d}"
    folder = _without_links(store).child(name)
    if not (is_legacy(folder) or is_torch_dist(folder)):
        formats = "legacy (torch) and torch_dist"
        raise ValueError(f"{folder.describe()} is no checkpoint in a format that is supported: {formats}")
    return folder


def _without_links(store: Store) -> Store:
    """The store, if none of its folders is a link: such may lead anywhere."""
    if isinstance(store, LocalStore):
        for name in store.folders():
            if (store.folder / name).is_symlink():
                raise ValueError(f"{store.folder / name} is a symbolic link, which is not followed; name its target")
    return store
