"""Tokenising a corpus: `data prepare` on one core against the tokenizer library alone, taking turns in one run.

The library gets its texts as Python strings in memory and gives lists of ids, in one batch call on one thread: no
files, no JSON, no data set. `prepare` does everything from the file to the finished `.bin/.idx` pair.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from megacore.bench.harness import Comparison, alternate, comparison
from megacore.data.found_text import library_files, sources
from megacore.data.prepare import prepare
from megacore.data.text.options import ReadOptions
from megacore.data.train_tokenizer import train_sentencepiece
from megacore.processes import one_thread_for_libraries

BASELINE = "library"
VOCAB_SIZE = 8000


@dataclass(frozen=True)
class Case:
    """A shape of corpus and a tokenizer library."""

    name: str
    library: str  # sentencepiece or tokenizers
    documents: str  # files, lines or one


CASES = tuple(
    Case(f"{shape}, {library}", library, documents)
    for library in ("sentencepiece", "tokenizers")
    for shape, documents in (("source files", "files"), ("one-line documents", "lines"), ("one document", "one"))
)


def texts_of(case: Case, max_bytes: int) -> list[str]:
    """The interpreter's own library as documents of the case's shape."""
    files = list(sources(library_files(), max_bytes))
    if case.documents == "one":
        return ["\n".join(files)]
    return files if case.documents == "files" else [line for text in files for line in text.split("\n") if line.strip()]


def make_tokenizer(library: str, texts: Sequence[str], folder: Path) -> str:
    """Train a tokenizer of that library; returns its path."""
    if library == "sentencepiece":
        source = folder / "training.txt"
        source.write_text("\n".join(texts), encoding="utf-8")
        return train_sentencepiece([str(source)], str(folder / "tokenizer.model"), VOCAB_SIZE).tokenizer.spec
    tokenizers = import_module("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, VOCAB_SIZE, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def library_alone(case: Case, path: str, texts: list[str]) -> Callable[[], object]:
    """The library's own batch call on one thread, down to lists of ids."""
    library = import_module(case.library)
    if case.library == "sentencepiece":
        processor = library.SentencePieceProcessor(model_file=path)
        return lambda: processor.encode(texts, num_threads=1)
    tokenizer = library.Tokenizer.from_file(path)
    return lambda: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def measure(case: Case, rounds: int, max_bytes: int = 4_000_000) -> Comparison:
    """One case: both sides in turn. The ratio is per core: `prepare` runs with one worker, and the seconds are the
    process' CPU seconds, which other programs on the machine do not lengthen."""
    one_thread_for_libraries()
    with tempfile.TemporaryDirectory(prefix="megacore-bench-") as name:
        folder = Path(name)
        texts = texts_of(case, max_bytes)
        tokenizer = make_tokenizer(case.library, texts, folder)
        corpus = folder / ("corpus.txt" if case.documents == "one" else "corpus.jsonl")
        if case.documents == "one":
            corpus.write_text(texts[0], encoding="utf-8", newline="")
        else:
            corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

        def ours() -> object:
            return prepare([str(corpus)], tokenizer, str(folder / "data"), ReadOptions(), workers=1, overwrite=True)

        ours()
        sides = {"prepare": ours, BASELINE: library_alone(case, tokenizer, texts)}
        seconds = alternate(sides, rounds, warmup=1, clock=time.process_time)
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    settings = {"documents": len(texts), "megabytes": round(num_bytes / 1e6, 1), "vocabulary": VOCAB_SIZE}
    return comparison(f"tokenise: {case.name}", "prepare", seconds, settings)
