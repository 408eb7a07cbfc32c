"""An HF folder as a source of weights under our names, of which any slice is read alone."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megacore.checkpoint.hf.family import Family, family_of
from megacore.checkpoint.hf.fields import Fields
from megacore.checkpoint.hf.files import CONFIG, GENERATION, TOKENIZER_FILES, FolderFiles
from megacore.checkpoint.hf.placement import VOCABULARY, Placements
from megacore.checkpoint.hf.strict_json import read_object
from megacore.checkpoint.hf.tensor_files import NUMBERS, StoredTensor
from megacore.checkpoint.store import open_store
from megacore.config.schema import ModelConfig

HF, TOKENIZER = "hf/", "tokenizer/"
"""What names of attachments begin with."""

COMPARED_ROWS = 1 << 12


class HfFolder:
    """A folder with config.json and safetensors files. Nothing in it is ever run; it is a ``WeightSource``.

    ``vocab_size``: the rows of the vocabulary's tensors that count, where they were padded (0: all).
    """

    def __init__(self, path: str, vocab_size: int = 0) -> None:
        """Raises ValueError for what is not whole, not supported or not safe, naming file, key and value."""
        self.path, self.vocab_size = path, vocab_size
        self.files = FolderFiles(open_store(path))
        where = f"{self.files.where}/{CONFIG}"
        self.config = read_object(self.files.read(CONFIG), where)
        fields = Fields(self.config, where)
        self.family: Family = family_of(fields)
        self.notes = [f"{where}: auto_map is ignored; megacore has its own {self.family.model_type}"]
        if not fields.has("auto_map"):
            self.notes.clear()
        self.model: ModelConfig = self._model(fields)
        self.tensors = self._named(self.files.tensors())
        if self.model.num_layers > len(self.tensors):
            raise ValueError(f"{where}: {self.model.num_layers} layers, but only {len(self.tensors)} tensors are there")
        rows = fields.integer("vocab_size")
        self.placements = Placements.make(self.family.forms, self.model, rows)
        self._check()

    @classmethod
    def open(cls, path: str) -> "HfFolder":
        """The folder with all of its vocabulary."""
        return cls(path)

    @property
    def what(self) -> str:
        return f"the HF folder {self.files.where}"

    @cached_property
    def attachments(self) -> Mapping[str, bytes]:
        found = {f"{HF}{name}": self.files.read(name) for name in (CONFIG, GENERATION) if name in self.files.names}
        found |= {f"{TOKENIZER}{name}": self.files.read(name) for name in TOKENIZER_FILES if name in self.files.names}
        return MappingProxyType(found)

    def dtype(self, name: str) -> torch.dtype:
        dtypes = {self.tensors[run.tensor].dtype for run in self.placements.of[name].runs}
        first = dtypes.pop()
        for other in dtypes:  # tensors that we fuse may differ; the wider format holds both exactly
            first = torch.promote_types(first, other)
        return first

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        place = self.placements.of[name]
        out = torch.empty(tuple(size), dtype=self.dtype(name))
        for whole in place.runs:
            run = whole.of_ours(start[0], size[0])
            if run is None:
                continue
            target = out[run.ours - start[0] : run.ours - start[0] + run.size]
            begin = (run.theirs, *start[1:])
            if place.transposed:
                target, begin = target.T, begin[::-1]
            self.tensors[run.tensor].fill(begin, target)
        return out

    def _model(self, fields: Fields) -> ModelConfig:
        model = self.family.read(fields)
        if not self.vocab_size:
            return model
        if not 0 < self.vocab_size <= model.vocab_size:
            raise ValueError(
                f"--vocab-size {self.vocab_size} is out of range: {fields.where} has vocab_size={model.vocab_size}, "
                "of whose rows the first are kept"
            )
        return self.family.read(Fields({**fields.values, "vocab_size": self.vocab_size}, fields.where))

    def _named(self, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """With the prefix that files of the bare model lack, and without buffers that follow from the config."""
        prefix = self.family.prefix
        if not any(name.startswith(prefix) for name in found):
            head = self.family.head
            found = {name if name == head else f"{prefix}{name}": each for name, each in found.items()}
        patterns = [re.compile(pattern) for pattern in self.family.leftovers]
        return {name: each for name, each in found.items() if not any(p.fullmatch(name) for p in patterns)}

    def _check(self) -> None:
        """Every tensor that the model has is there, in its shape and a format of numbers, and no other."""
        shapes = self.placements.shapes
        if missing := [name for name in shapes if name not in self.tensors]:
            raise ValueError(f"{self.files.where} lacks {_listed(missing)}, which a {self.family.model_type} has")
        extra = sorted(self.tensors.keys() - shapes.keys())
        if self.model.tie_embeddings:
            extra = [name for name in extra if not self._is_tied_copy(name)]
        if extra:
            raise ValueError(
                f"{self.files.where} has {_listed(extra)}, which a {self.family.model_type} of this config.json has not"
            )
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise ValueError(
                    f"{self.files.where}: {name} has shape {list(tensor.shape)}, but {CONFIG} means {list(shape)}"
                )
            if tensor.dtype not in NUMBERS:
                raise ValueError(
                    f"{self.files.where}: {name} is stored as {tensor.dtype}; fp64, fp32, bf16 and fp16 are supported"
                )

    def _is_tied_copy(self, name: str) -> bool:
        """Whether it is the output matrix, saved though it is the embedding: then it must be that to the last bit."""
        if name != self.family.head:
            return False
        copy = self.tensors[name]
        own = self.tensors[self.placements.of[VOCABULARY[0]].runs[0].tensor]
        if copy.shape != own.shape or copy.dtype != own.dtype:
            return False
        for row in range(0, own.shape[0], COMPARED_ROWS):
            size = (min(COMPARED_ROWS, own.shape[0] - row), own.shape[1])
            blocks = [torch.empty(size, dtype=own.dtype) for _ in range(2)]
            for tensor, block in zip((copy, own), blocks):
                tensor.fill((row, 0), block)
            if not torch.equal(*blocks):
                raise ValueError(
                    f"{self.files.where}: {name} is not the embedding, though {CONFIG} says tie_word_embeddings; "
                    'write "tie_word_embeddings": false there if it is an output matrix of its own'
                )
        return True


def original(attachments: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object that came with the weights under ``name`` ("config.json"); empty if there was none."""
    data = attachments.get(f"{HF}{name}")
    return {} if data is None else read_object(data, f"the {name} that came with the weights")


def is_hf_folder(path: str) -> bool:
    """Whether a folder is one of HF's: it has a config.json."""
    return CONFIG in open_store(path).names()


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest}"
