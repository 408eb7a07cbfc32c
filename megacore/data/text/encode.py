"""Blocks of text to arrays of tokens: what one worker process does all day."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacore.data.indexed import token_dtype
from megacore.data.text.blocks import BLOCK_BYTES, Block
from megacore.data.text.cutting import cut_text
from megacore.data.text.documents import documents
from megacore.data.text.options import ReadOptions
from megacore.data.text.sources import BadInput
from megacore.data.tokenizers import Tokenizer

PART_BYTES = 1 << 14  # longer texts go to the tokenizer in parts: its time grows faster than the text


@dataclass(frozen=True)
class Batch:
    """Work for one process at one time: some blocks of whole documents, or one part of a long document."""

    blocks: tuple[Block, ...]

    @property
    def starts(self) -> bool:
        return self.blocks[0].starts

    @property
    def ends(self) -> bool:
        return self.blocks[-1].ends


@dataclass(frozen=True)
class Tokenised:
    """What comes back of a batch."""

    ids: NDArray[np.generic]
    """[tokens] in the dtype of the data set, end-of-document tokens included."""
    lengths: NDArray[np.int64]
    """[documents] tokens of each; one entry for a part of a document."""
    starts: bool
    """False: the first document goes on from the batch before."""
    ends: bool
    """False: the last document goes on in the next batch."""
    num_bytes: int
    """Bytes of unpacked input."""
    consumed: int
    """Bytes of input on disk."""
    num_empty: int = 0
    num_broken: int = 0
    problem: str = ""
    """What is wrong with the user's input, if anything."""


def batches(blocks: Iterable[Block]) -> Iterator[Batch]:
    """Group small blocks (many small files), so that each batch is worth sending to another process."""
    group: list[Block] = []
    num_bytes = 0
    for block in blocks:
        alone = not (block.starts and block.ends)
        if group and (alone or num_bytes + block.num_bytes > BLOCK_BYTES):
            yield Batch(tuple(group))
            group, num_bytes = [], 0
        if alone:
            yield Batch((block,))
        else:
            group.append(block)
            num_bytes += block.num_bytes
    if group:
        yield Batch(tuple(group))


class BatchEncoder:
    """Turns batches into tokens, on one core.

    Args:
        tokenizer: opened in this process.
        options: how blocks become documents.
        eod: id put behind every document; None: nothing.
    """

    def __init__(self, tokenizer: Tokenizer, options: ReadOptions, eod: int | None) -> None:
        self.tokenizer = tokenizer
        self.options, self.eod = options, eod
        self.dtype = token_dtype(self.tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> Tokenised:
        """Tokens of a batch; what is wrong with the input comes back as `problem`, so that it crosses processes."""
        num_bytes = sum(block.num_bytes for block in batch.blocks)
        consumed = sum(block.consumed for block in batch.blocks)
        sizes = (batch.starts, batch.ends, num_bytes, consumed)
        try:
            parts = [documents(block, self.options) for block in batch.blocks]
            texts = [text for part in parts for text in part.texts]
            ids, lengths = self._encode(texts, batch.starts)
        except BadInput as problem:
            return Tokenised(np.empty(0, self.dtype), np.empty(0, np.int64), *sizes, problem=str(problem))
        num_empty, num_broken = sum(part.num_empty for part in parts), sum(part.num_broken for part in parts)
        if self.eod is not None and batch.ends:
            ids, lengths = append(ids, lengths, self.eod)
        return Tokenised(ids, lengths, *sizes, num_empty, num_broken)

    def _encode(self, texts: list[str], starts: bool) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
        """Tokens of texts, long ones in parts; `starts` is False if the first goes on from an earlier batch."""
        if starts and max(map(len, texts), default=0) * 4 <= PART_BYTES:
            ids, lengths = self.tokenizer.encode_batch(texts)
            parts = texts
        else:
            cut = [cut_text(text, PART_BYTES) for text in texts]
            parts = [part for pieces in cut for part in pieces]
            firsts = np.cumsum([0, *map(len, cut)])[:-1]
            goes_on = np.ones(len(parts), bool)
            goes_on[firsts[0 if starts else 1 :]] = False
            ids, part_lengths = encode_parts(self.tokenizer, parts, goes_on.tolist())
            lengths = np.add.reduceat(part_lengths, firsts)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.tokenizer.vocab_size:
            raise BadInput(self._beyond_vocabulary(ids, parts))
        return ids.astype(self.dtype), lengths

    def _beyond_vocabulary(self, ids: NDArray[np.int32], texts: list[str]) -> str:
        bad = int(np.flatnonzero((ids < 0) | (ids >= self.tokenizer.vocab_size))[0])
        lengths = [len(self.tokenizer.encode(text)) for text in texts]
        text = texts[int(np.searchsorted(np.cumsum(lengths), bad, side="right"))]
        return (
            f"tokenizer {self.tokenizer.spec!r} gave the id {ids[bad]}, beyond its vocabulary of "
            f"{self.tokenizer.vocab_size}, in the document that begins {text[:60]!r}; its files do not fit together"
        )


def encode_parts(
    tokenizer: Tokenizer, parts: list[str], goes_on: list[bool]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Tokens of texts of which some go on from the one before.

    Many tokenizers put a space before every text they are given (Llama 2's, Mistral's). A part that goes on is
    therefore encoded behind a character from which it is surely apart, whose tokens are then taken away.
    """
    anchors = [("a" if part[:1].isspace() else "\n") if marked else "" for part, marked in zip(parts, goes_on)]
    anchor_ids = {anchor: tokenizer.encode_batch([anchor]).ids for anchor in ("a", "\n", "")}
    ids, lengths = tokenizer.encode_batch([anchor + part for anchor, part in zip(anchors, parts)])
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    for i, anchor in enumerate(anchors):
        head = anchor_ids[anchor]
        if np.array_equal(pieces[i][: len(head)], head):
            pieces[i] = pieces[i][len(head) :]
        else:  # the two became one token: an inexact cut
            pieces[i] = tokenizer.encode_batch([parts[i]]).ids
    return np.concatenate(pieces), np.array([len(piece) for piece in pieces], np.int64)


def append(
    ids: NDArray[np.generic], lengths: NDArray[np.int64], token: int
) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """`ids` with `token` behind each of the texts of these lengths."""
    longer = np.full(ids.size + lengths.size, token, ids.dtype)
    ends = np.cumsum(lengths + 1) - 1
    keep = np.ones(longer.size, bool)
    keep[ends] = False
    longer[keep] = ids
    return longer, lengths + 1
