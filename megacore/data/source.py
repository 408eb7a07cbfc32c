"""The data sets of a run: each opened, checked, and cut to the split that is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from megacore.config.schema import DataConfig
from megacore.data.blend import check_weights, temperature_weights
from megacore.data.indexed import IndexedDataset
from megacore.data.meta import DataMeta
from megacore.data.splits import split_range


@dataclass(frozen=True)
class Source:
    """One data set's share in a stream: sequences [first, last)."""

    dataset: IndexedDataset
    meta: DataMeta
    first: int
    last: int
    num_tokens: int  # of the range
    weight: float

    def cache_folder(self, config: DataConfig) -> Path:
        """Where indices of this data set are kept: data.cache, else `PREFIX.index/` beside the data."""
        return Path(config.cache) if config.cache else Path(f"{self.dataset.prefix}.index")

    def gather(self, pieces: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of [pieces, 3] (sequence, offset, length), one after the other."""
        begins = self.dataset.offsets[pieces[:, 0]] // self.dataset.dtype.itemsize + pieces[:, 1]
        ends = begins + pieces[:, 2]
        tokens, text = self.dataset.tokens, np.empty(int(pieces[:, 2].sum()), np.int64)
        place = 0
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            text[place : place + end - begin] = tokens[begin:end]
            place += end - begin
        return text

    def report_bad_token(self, pieces: NDArray[np.int64], vocab_size: int) -> NoReturn:
        """Raise the error that names the first token beyond the vocabulary and its document."""
        for sequence, offset, length in pieces.tolist():
            part = self.dataset.sequence(sequence, offset, offset + length).astype(np.int64)
            bad = np.flatnonzero((part < 0) | (part >= vocab_size))
            if len(bad):
                where = f"document {self.dataset.document_of(sequence)} of {self.dataset.prefix}"
                what = f"token {offset + int(bad[0])} of {where} has id {part[bad[0]]}"
                fix = "train with the data's own tokenizer, or raise model.vocab_size"
                raise ValueError(f"{what}, beyond the vocabulary of {vocab_size} (model.vocab_size); {fix}")
        raise AssertionError(f"no token of {pieces.tolist()} lies beyond {vocab_size}")


def open_sources(config: DataConfig, split: str, vocab_size: int) -> list[Source]:
    """Open what a split reads.

    Raises:
        ValueError: there is no such data, it is damaged, empty, or of tokenizers that do not agree.
    """
    blend, shares = read_by(config, split)
    check_weights([weight for weight, _ in blend])
    datasets = [(IndexedDataset(prefix), weight) for weight, prefix in blend]
    sources = [cut(dataset, DataMeta.load(dataset), weight, shares, split) for dataset, weight in datasets]
    _check_agreement(sources, vocab_size)
    return sources


def read_by(config: DataConfig, split: str) -> tuple[Sequence[tuple[float, str]], Sequence[float]]:
    """The blend that a split is read from, and how that blend's data sets are shared out among the splits.

    With `data.eval_blend` training reads all of `data.blend` and validation all of `data.eval_blend`; otherwise both
    are ranges of `data.blend` by `data.split`.

    Raises:
        ValueError: there is no test split, because of `data.eval_blend`.
    """
    if not config.eval_blend:
        return config.blend, config.split
    if split == "test":
        raise ValueError("data.eval_blend gives validation data only; leave it empty to get a test split")
    return (config.blend, (1.0, 0.0, 0.0)) if split == "train" else (config.eval_blend, (0.0, 1.0, 0.0))


def cut(dataset: IndexedDataset, meta: DataMeta, weight: float, shares: Sequence[float], split: str) -> Source:
    """A data set's part in a split.

    Raises:
        ValueError: it holds no tokens, or nothing of it falls to the split.
    """
    prefix = dataset.prefix
    if dataset.dtype.kind == "f":
        raise ValueError(f"{prefix}.bin holds {dataset.dtype}, not token ids; prepare it from text")
    if not dataset.num_tokens:
        raise ValueError(f"{prefix} holds no tokens; prepare a corpus with text in it")
    first, last = split_range(shares, dataset.num_sequences, split, prefix)
    num_tokens = int(dataset.lengths[first:last].sum(dtype=np.int64))
    if not num_tokens:
        rule = f"the {last - first} documents that data.split={list(shares)} gives {split} hold no tokens"
        raise ValueError(f"{prefix}: {rule}; raise the {split} share, or leave out empty documents")
    return Source(dataset, meta, first, last, num_tokens, weight)


def _check_agreement(sources: list[Source], vocab_size: int) -> None:
    """Refuse data that cannot be meant: larger vocabularies than the model's, mixed tokenizers."""
    for source in sources:
        known = source.meta.vocab_size
        if vocab_size and known and known > vocab_size:
            what = f"{source.dataset.prefix} was prepared with a vocabulary of {known}"
            raise ValueError(f"{what}, but model.vocab_size={vocab_size}; set it to {known} or more")
    hashes = {source.meta.tokenizer_hash: source for source in sources if source.meta.tokenizer_hash}
    if len(hashes) > 1:
        one, other = list(hashes.values())[:2]
        names = " and ".join(f"{s.dataset.prefix} ({s.meta.tokenizer})" for s in (one, other))
        raise ValueError(f"data.blend mixes tokenizers: {names}; prepare all of it with one")


def known_eod(sources: list[Source]) -> int | None:
    """The end-of-document token that the data sets note; None if none of them notes one.

    Raises:
        ValueError: two of them note different tokens; names both.
    """
    noted = {source.meta.eod: source.dataset.prefix for source in sources if source.meta.eod is not None}
    if len(noted) > 1:
        names = " and ".join(f"{prefix} (token {eod})" for eod, prefix in list(noted.items())[:2])
        raise ValueError(f"data.blend mixes end-of-document tokens: {names}; prepare all of it with one --eod-token")
    return next(iter(noted), None)


def mixture_weights(config: DataConfig, sources: list[Source]) -> list[float]:
    """The weights as given, or by size where data.temperature is set."""
    if config.temperature < 0:
        raise ValueError(f"data.temperature={config.temperature} must be 0 (use the weights) or above; try 1")
    if config.temperature == 0:
        return [source.weight for source in sources]
    return temperature_weights([source.num_tokens for source in sources], config.temperature)
