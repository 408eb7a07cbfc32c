"""What a data set holds, and whether its tokens can be right."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megacore.data.indexed import IndexedDataset, bin_path, idx_path
from megacore.data.meta import DataMeta
from megacore.data.run_tokenizer import open_recorded

BLOCK_TOKENS = 1 << 22
QUICK_BLOCKS = 256  # 1 to 4 GB of tokens: seconds to read
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Inspection:
    """Facts for the screen and for `--json`."""

    facts: dict[str, Any]
    samples: list[str]
    """The beginnings of some documents, as text."""
    problems: list[str]
    """What is wrong with the data set; empty: nothing found."""


def inspect(prefix: str, num_samples: int = 0, full: bool = False) -> Inspection:
    """Read a data set's facts.

    Args:
        num_samples: how many documents to show the beginning of, spread over the data set.
        full: look at every token, however many there are; else at 1 G tokens at most, spread evenly.

    Raises:
        ValueError: the data set is missing or damaged.
    """
    dataset = IndexedDataset(prefix)
    meta = DataMeta.load(dataset)
    problems: list[str] = []
    largest, share = largest_token(dataset, full)
    if meta.vocab_size and largest >= meta.vocab_size:
        problems.append(_beyond(dataset, meta.vocab_size))
    sizes = document_sizes(dataset)
    facts = {
        "prefix": prefix,
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "vocab_size": meta.vocab_size,
        "tokenizer": meta.tokenizer,
        "tokenizer_hash": meta.tokenizer_hash,
        "eod": meta.eod,
        "longest": int(sizes.max(initial=0)),
        "shortest": int(sizes.min()) if sizes.size else 0,
        "mean": dataset.num_tokens / max(1, dataset.num_documents),
        "empty_documents": int(np.count_nonzero(sizes == 0)),
        "max_id": largest if dataset.num_tokens else None,
        "checked": share,
        "bytes": bin_path(prefix).stat().st_size + idx_path(prefix).stat().st_size,
    }
    return Inspection(facts, _samples(dataset, meta, num_samples, problems), problems)


def document_sizes(dataset: IndexedDataset) -> np.ndarray:
    """int64 [documents], tokens of each."""
    ends = np.concatenate([[0], np.cumsum(dataset.lengths, dtype=np.int64)])[dataset.bounds]
    return np.diff(ends)


def largest_token(dataset: IndexedDataset, full: bool) -> tuple[int, float]:
    """(largest id met, share of the tokens looked at)."""
    num_blocks = -(-dataset.num_tokens // BLOCK_TOKENS)
    step = 1 if full else max(1, -(-num_blocks // QUICK_BLOCKS))
    largest, seen = -1, 0
    for start in range(0, dataset.num_tokens, step * BLOCK_TOKENS):
        block = dataset.tokens[start : start + BLOCK_TOKENS]
        largest, seen = max(largest, int(block.max())), seen + block.size
    return largest, seen / max(1, dataset.num_tokens)


def _beyond(dataset: IndexedDataset, vocab_size: int) -> str:
    """Names the first token beyond the vocabulary and its document."""
    for start in range(0, dataset.num_tokens, BLOCK_TOKENS):
        found = np.flatnonzero(dataset.tokens[start : start + BLOCK_TOKENS] >= vocab_size)
        if found.size:
            place = start + int(found[0])
            sequence = int(np.searchsorted(dataset.offsets, place * dataset.dtype.itemsize, side="right")) - 1
            return (
                f"token id {dataset.tokens[place]} in document {dataset.document_of(sequence)} is beyond the "
                f"vocabulary of {vocab_size}; the data is damaged or its .meta.json is another data set's: "
                "prepare it again"
            )
    raise AssertionError(f"no token of {dataset.prefix} is beyond {vocab_size}")


def _samples(dataset: IndexedDataset, meta: DataMeta, count: int, problems: list[str]) -> list[str]:
    if not count or not dataset.num_documents:
        return []
    if not meta.tokenizer:
        problems.append(f"{dataset.prefix} does not say its tokenizer (another tool made it): no text can be shown")
        return []
    tokenizer = open_recorded(dataset.prefix, meta)
    count = min(count, dataset.num_documents)
    chosen = [i * dataset.num_documents // count for i in range(count)]
    return [tokenizer.decode(dataset.document(document)[:SAMPLE_TOKENS].tolist()) for document in chosen]
