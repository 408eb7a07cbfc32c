"""Training a SentencePiece tokenizer on a corpus of any size.

What comes out gives back every text exactly: no normalisation, no space added or taken away, bytes for characters
that the vocabulary lacks. It is byte-pair encoding over words with their leading space; digits stand alone; runs of
spaces, as in source code, may be one token; a line break is a token of its own.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacore.config.schema import DataConfig
from megacore.data.files import write_atomic
from megacore.data.text.blocks import Block, read_blocks
from megacore.data.text.cutting import cut_text
from megacore.data.text.documents import documents
from megacore.data.text.options import ReadOptions
from megacore.data.text.sources import BadInput, find_sources
from megacore.data.tokenizers import Tokenizer, open_tokenizer
from megacore.data.tokenizers.base import require

SAMPLE_BYTES = 64 << 20
LINE_BYTES = 4096  # longer lines go to the trainer in parts
CONTROL_SYMBOLS = ("<unk>", "<s>", "</s>")  # ids 0, 1 and 2; the last one ends documents
COVERAGE = 0.9995  # share of the text's characters that get tokens of their own where there is room


@dataclass(frozen=True)
class Trained:
    """A new tokenizer and what it was made from."""

    tokenizer: Tokenizer
    num_bytes: int
    """Of the corpus, unpacked."""
    sample_bytes: int
    """Of these, seen by the trainer."""
    bytes_per_token: float
    """On a part of the sample."""


def train_sentencepiece(
    inputs: Sequence[str],
    output: str,
    vocab_size: int,
    options: ReadOptions = ReadOptions(),  # noqa: B008 (frozen)
    *,
    sample_bytes: int = SAMPLE_BYTES,
    special_tokens: Sequence[str] = DataConfig().fim_tokens,
    overwrite: bool = False,
    on_progress: Callable[[str], object] = lambda message: None,
) -> Trained:
    """Train a tokenizer and write it to `output`, a `.model` file.

    Args:
        inputs: files, folders, patterns, or "-", as `data prepare` takes them.
        output: FILE.model; its folder is made if need be.
        vocab_size: exact number of tokens.
        options: how files become documents.
        sample_bytes: how much text the trainer sees at most, taken evenly from the whole corpus; this bounds memory.
        special_tokens: names of tokens that no text gives, such as those of fill-in-the-middle.
        overwrite: replace an existing file.
        on_progress: told in words what happens.

    Raises:
        ValueError: no text, a vocabulary too small or too large for it (says what is possible), or a bad output.
    """
    path = Path(output).expanduser()
    _check_output(path, overwrite)
    reserved = 256 + len(CONTROL_SYMBOLS) + len(special_tokens)
    if vocab_size <= reserved:
        raise ValueError(
            f"--vocab-size {vocab_size} is too small: 256 bytes and {reserved - 256} special tokens come first, and "
            f"something must be left to learn; try {reserved + 244} or more"
        )
    sources = find_sources(inputs, options.format)
    on_progress(f"reading {len(sources)} file{'s' * (len(sources) != 1)}")
    blocks, num_bytes = spread_sample(read_blocks(sources, options), sample_bytes)
    texts = [text for block in blocks for text in documents(block, options).texts]
    del blocks
    if not any(text.strip() for text in texts):
        raise BadInput(f"there is no text in {', '.join(inputs)}; a tokenizer learns from text")
    seen = sum(len(text.encode("utf-8")) for text in texts)
    on_progress(f"training {vocab_size:,} tokens on {seen / 1e6:,.1f} MB of text")
    model = _train(texts, vocab_size, special_tokens, room=vocab_size - reserved)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, model)
    tokenizer = open_tokenizer(str(path))
    return Trained(tokenizer, num_bytes, seen, _bytes_per_token(tokenizer, texts))


def spread_sample(blocks: Iterator[Block], limit: int) -> tuple[list[Block], int]:
    """Blocks of about `limit` bytes at most, evenly spread, and the bytes of all; holds twice `limit` at most.

    Takes every block, then every 2nd, 4th, ... as more come, so the length of the corpus need not be known.
    """
    kept: list[Block] = []
    held = total = 0
    stride = 1
    for i, block in enumerate(blocks):
        total += block.num_bytes
        if i % stride == 0:
            kept.append(block)
            held += block.num_bytes
        while held > 2 * limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            held = sum(block.num_bytes for block in kept)
    if held > limit:
        wanted = max(1, len(kept) * limit // held)
        kept = [kept[i * len(kept) // wanted] for i in range(wanted)]
    return kept, total


def _check_output(path: Path, overwrite: bool) -> None:
    if path.suffix != ".model":
        raise ValueError(f"--output {path} must end in .model, by which a SentencePiece tokenizer is known")
    if path.exists() and not overwrite:
        raise ValueError(
            f"{path} exists already, and data sets may have been made with it; say --overwrite to replace it, or name "
            "another --output"
        )


def _train(texts: list[str], vocab_size: int, special_tokens: Sequence[str], room: int) -> bytes:
    """The trained model, serialised; `room` is what the vocabulary has beside bytes and special tokens."""
    usual = rare_characters(texts, max(1, room * 3 // 4), COVERAGE)
    try:
        return _run_trainer(texts, usual, vocab_size, special_tokens)
    except _TooLarge:
        # Too little is left to merge: give tokens to as many characters as fit.
        try:
            return _run_trainer(texts, rare_characters(texts, room, 1.0), vocab_size, special_tokens)
        except _TooLarge as reason:
            raise ValueError(
                f"--vocab-size {vocab_size} is too large for this text: it has no more than {reason.possible} tokens; "
                f"say --vocab-size {reason.possible} or less, or give more text"
            ) from reason


class _TooLarge(Exception):
    """The text has only `possible` different tokens."""

    def __init__(self, possible: int) -> None:
        super().__init__(possible)
        self.possible = possible


def _run_trainer(texts: list[str], rare: str, vocab_size: int, special_tokens: Sequence[str]) -> bytes:
    sentencepiece = require("sentencepiece", "training a tokenizer")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts, rare),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,  # rare characters were taken out already
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            control_symbols=list(special_tokens),
            minloglevel=2,
        )
    except RuntimeError as reason:
        too_large = re.search(r"too high .*value <= (\d+)", str(reason))
        if too_large is None:
            raise
        raise _TooLarge(int(too_large[1])) from reason
    return model.getvalue()


def rare_characters(texts: Sequence[str], room: int, coverage: float) -> str:
    """The characters that get no token of their own: all but the most frequent, at most `room`, that make up `coverage`
    of the text."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        for start in range(0, len(text), 1 << 20):
            codes = np.frombuffer(text[start : start + (1 << 20)].encode("utf-32-le"), np.uint32)
            found = np.bincount(codes)
            counts[: len(found)] += found
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    enough = int(np.searchsorted(np.cumsum(counts[order]), coverage * counts.sum())) + 1
    return "".join(map(chr, order[min(enough, room) :]))


def sentences(texts: Sequence[str], rare: str) -> Iterator[str]:
    """What the trainer sees: lines, in parts where they are long or have characters that are bytes anyway."""
    cuts = re.compile(f"[\n{re.escape(rare)}]+")
    for text in texts:
        for line in cuts.split(text):
            if len(line) * 4 <= LINE_BYTES:
                if line:
                    yield line
            else:
                yield from cut_text(line, LINE_BYTES)


def _bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    sample = [part for text in texts[:: max(1, len(texts) // 64)] for part in cut_text(text, 1 << 15)[:4]][:256]
    return sum(len(text.encode("utf-8")) for text in sample) / max(1, len(tokenizer.encode_batch(sample).ids))
