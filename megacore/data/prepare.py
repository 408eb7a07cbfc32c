"""Text files to a `.bin/.idx` data set, over many processes.

One process reads blocks and writes tokens; workers do the rest. Results are written in the order of the input and
blocks do not depend on the workers, so the data set is the same, byte for byte, whatever their number.
"""

import fcntl
import glob
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megacore.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path, token_dtype
from megacore.data.meta import DataMeta
from megacore.data.text.blocks import read_blocks
from megacore.data.text.encode import Batch, BatchEncoder, Tokenised, batches
from megacore.data.text.options import ReadOptions
from megacore.data.text.sources import BadInput, Source, find_sources
from megacore.data.tokenizers import Tokenizer, open_tokenizer
from megacore.processes import end_with_parent, one_thread_for_libraries

AHEAD = 4  # batches waiting per worker
MAX_SEQUENCE = 1 << 27  # tokens of one document held in memory; a longer one becomes several sequences


@dataclass
class Progress:
    """How far a preparation is."""

    total: int
    """Bytes of all files on disk; 0: not known (a pipe)."""
    num_files: int
    consumed: int = 0
    """Of `total`, bytes done."""
    num_bytes: int = 0
    """Bytes of text done, unpacked."""
    num_documents: int = 0
    num_tokens: int = 0
    num_empty: int = 0
    """Documents left out because they were empty."""
    num_broken: int = 0
    """Documents left out because of errors="skip"."""
    seconds: float = 0.0


def prepare(
    inputs: Sequence[str],
    tokenizer: str,
    output: str,
    options: ReadOptions = ReadOptions(),  # noqa: B008 (frozen)
    *,
    workers: int = 1,
    append_eod: bool = True,
    eod_token: str = "",
    overwrite: bool = False,
    on_progress: Callable[[Progress], object] = lambda progress: None,
) -> Progress:
    """Tokenise files into `output`.bin/.idx and note their facts in `output`.meta.json.

    Nothing is seen of the data set until it is whole; after an error or a kill there is none (or the old one).

    Args:
        inputs: files, folders, patterns, or "-" for standard input.
        tokenizer: as `open_tokenizer` takes it.
        output: path without ending; its folder is made if need be.
        options: how files become documents.
        workers: processes that tokenise; with 1, this process does.
        append_eod: put the end-of-document token behind every document.
        eod_token: its name, if not the one that the tokenizer says.
        overwrite: replace a data set of that name.
        on_progress: called after each batch (every half megabyte or so).

    Raises:
        ValueError: the user's input is wrong: files, tokenizer, options or output; says what to do.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1; leave it out to use all cores")
    sources = find_sources(inputs, options.format)
    opened = open_tokenizer(tokenizer)
    eod = _end_of_document(opened, append_eod, eod_token)
    with output_lock(output, overwrite):
        progress = Progress(sum(source.size for source in sources), len(sources))
        with IndexedWriter(output, token_dtype(opened.vocab_size)) as writer:
            _write_all(writer, _tokenised(sources, opened, options, eod, workers), progress, on_progress)
            if not progress.num_documents:
                raise BadInput(_nothing_in(sources, progress))
        write_meta(output, opened, eod)
    return progress


def write_meta(prefix: str, tokenizer: Tokenizer, eod: int | None) -> DataMeta:
    """Note beside a data set what it was tokenised with."""
    derived = DataMeta.derive(IndexedDataset(prefix))
    counts = (derived.num_documents, derived.num_sequences, derived.num_tokens, derived.fingerprint)
    is_file = Path(tokenizer.spec).expanduser().exists() and tokenizer.spec != "bytes"
    spec = os.path.realpath(Path(tokenizer.spec).expanduser()) if is_file else tokenizer.spec
    meta = DataMeta(*counts, tokenizer=spec, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size, eod=eod)
    meta.save(prefix)
    return meta


@contextmanager
def output_lock(output: str, overwrite: bool) -> Iterator[None]:
    """Be the only one to write a data set. Makes its folder, and clears away what a killed run left.

    Raises:
        ValueError: the data set exists and `overwrite` is False, another process is writing it, or the folder cannot
            be made.
    """
    index, data = idx_path(output), bin_path(output)
    if output.endswith(("/", ".bin", ".idx")):
        raise ValueError(f"--output {output} must be a path without ending, such as data/corpus")
    lock = index.with_name(f".{index.name}.lock")
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+b")
    except OSError as reason:
        raise ValueError(f"--output {output}: cannot write in {index.parent}: {reason.strerror}") from reason
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = os.fstat(file.fileno()).st_nlink > 0  # 0: another process finished since we opened the file
        except BlockingIOError:
            alone = False
        if not alone:
            raise ValueError(f"another process is writing {output} now; wait for it, or name another output")
        if not overwrite and (index.exists() or data.exists()):
            there = index if index.exists() else data
            raise ValueError(f"{there} exists already; say --overwrite to replace it, or name another --output")
        for left in index.parent.glob(f".{glob.escape(index.name)}.writing-*"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _end_of_document(tokenizer: Tokenizer, append_eod: bool, name: str) -> int | None:
    if name:
        return tokenizer.token_id(name)
    if append_eod and tokenizer.eod is None:
        raise ValueError(
            f"tokenizer {tokenizer.spec!r} does not say which token ends a document; name one with --eod-token "
            f"(its special tokens are {', '.join(tokenizer.special_tokens) or 'none'}), or say --no-eod"
        )
    return tokenizer.eod if append_eod else None


def _nothing_in(sources: list[Source], progress: Progress) -> str:
    names = ", ".join(source.name for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
    left_out = f"{progress.num_empty} empty and {progress.num_broken} broken documents were left out"
    return f"there is no text in {names} ({left_out}); nothing was written"


def _write_all(
    writer: IndexedWriter,
    results: Iterator[Tokenised],
    progress: Progress,
    on_progress: Callable[[Progress], object],
) -> None:
    started = time.monotonic()
    long_document = LongDocument(writer)
    for result in results:
        if result.problem:
            raise BadInput(result.problem)
        if result.starts and result.ends:
            writer.add_documents(result.ids, result.lengths)
        else:
            long_document.add(result)
        progress.consumed += result.consumed
        progress.num_bytes += result.num_bytes
        progress.num_empty += result.num_empty
        progress.num_broken += result.num_broken
        progress.num_documents, progress.num_tokens = writer.num_documents, writer.num_tokens
        progress.seconds = time.monotonic() - started
        on_progress(progress)


class LongDocument:
    """Collects the parts of a document that is longer than a block."""

    def __init__(self, writer: IndexedWriter) -> None:
        self.writer = writer
        self.parts: list[np.ndarray] = []
        self.broken = self.written = False

    def add(self, part: Tokenised) -> None:
        """Take the next part; the last one writes the document, unless a part of it is broken and to be left out.

        Of a broken document so long that sequences of it were written already, those stay, as a document.
        """
        if part.starts:
            self.broken = self.written = False
        self.broken |= part.num_broken > 0
        self.parts.append(part.ids)
        if part.ends or sum(ids.size for ids in self.parts) >= MAX_SEQUENCE:
            if not self.broken:
                self.writer.add_sequence(np.concatenate(self.parts))
                self.written = True
            self.parts = []
        if part.ends and self.written:
            self.writer.end_document()


def _tokenised(
    sources: list[Source], tokenizer: Tokenizer, options: ReadOptions, eod: int | None, workers: int
) -> Iterator[Tokenised]:
    """Results of all batches, in order."""
    work = batches(read_blocks(sources, options))
    if workers == 1:
        yield from map(BatchEncoder(tokenizer, options, eod), work)
        return
    # Fresh processes: a forked one would inherit the caller's threads' locks.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker) as pool:
        waiting: deque[Future[Tokenised]] = deque()
        try:
            for batch in work:
                waiting.append(pool.submit(_encode, batch, tokenizer.spec, options, eod))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as reason:
            raise RuntimeError(
                "a worker process died, perhaps for lack of memory (see dmesg); try again with fewer --workers"
            ) from reason
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@lru_cache(maxsize=1)
def _encoder(tokenizer: str, options: ReadOptions, eod: int | None) -> BatchEncoder:
    return BatchEncoder(open_tokenizer(tokenizer), options, eod)


def _encode(batch: Batch, tokenizer: str, options: ReadOptions, eod: int | None) -> Tokenised:
    """In a worker: the tokenizer is opened at the first batch and kept."""
    return _encoder(tokenizer, options, eod)(batch)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, die with it however it dies, and keep to one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    one_thread_for_libraries()
