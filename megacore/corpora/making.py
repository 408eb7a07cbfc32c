"""The subcommands that make something: a tokenizer, a data set from text, one data set of several."""

import time
from collections.abc import Sequence

from megacore.config.schema import DataConfig
from megacore.corpora.progress import ProgressDisplay, speed
from megacore.corpora.report import Report, count, size
from megacore.data.merging import merge_datasets
from megacore.data.prepare import prepare
from megacore.data.text.options import ReadOptions
from megacore.data.train_tokenizer import train_sentencepiece
from megacore.monitor.console import Console, human_time
from megacore.processes import one_thread_for_libraries, usable_cores


def make_tokenizer(
    inputs: Sequence[str],
    output: str,
    vocab_size: int,
    sample_mb: float,
    special_tokens: Sequence[str] | None,
    overwrite: bool,
    reading: ReadOptions,
    console: Console,
) -> Report:
    """Train a tokenizer (see `train_sentencepiece`); without special tokens named, those of fill-in-the-middle."""
    if sample_mb <= 0:
        raise ValueError(f"--sample-mb {sample_mb} must be above 0; leave it out for 64")
    started = time.monotonic()
    trained = train_sentencepiece(
        inputs,
        output,
        vocab_size,
        reading,
        sample_bytes=int(sample_mb * 1e6),
        special_tokens=special_tokens or list(DataConfig().fim_tokens),
        overwrite=overwrite,
        on_progress=console.line,
    )
    tokenizer = trained.tokenizer
    facts = {
        "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "special_tokens": tokenizer.special_tokens,
        "hash": tokenizer.hash,
        "bytes_per_token": trained.bytes_per_token,
        "corpus_bytes": trained.num_bytes,
        "sample_bytes": trained.sample_bytes,
    }
    lines = [
        f"wrote {tokenizer.spec}: {tokenizer.vocab_size:,} tokens, {trained.bytes_per_token:.2f} bytes of text per "
        f"token, {human_time(time.monotonic() - started)}",
        f"next: megacore data prepare --input FILE... --tokenizer {tokenizer.spec} --output PREFIX",
    ]
    return Report(facts, lines)


def make_dataset(
    inputs: Sequence[str],
    tokenizer: str,
    output: str,
    workers: int,
    append_eod: bool,
    eod_token: str,
    overwrite: bool,
    reading: ReadOptions,
    console: Console,
) -> Report:
    """Tokenise files (see `prepare`); with 0 workers, one per core."""
    one_thread_for_libraries()  # one worker works in this very process
    done = prepare(
        inputs,
        tokenizer,
        output,
        reading,
        workers=workers or usable_cores(),
        append_eod=append_eod,
        eod_token=eod_token,
        overwrite=overwrite,
        on_progress=ProgressDisplay(console).update,
    )
    facts = {
        "output": output,
        "documents": done.num_documents,
        "tokens": done.num_tokens,
        "bytes": done.num_bytes,
        "seconds": done.seconds,
        "empty": done.num_empty,
        "broken": done.num_broken,
    }
    lines = [
        f"wrote {output}.bin and .idx: {count(done.num_documents, 'document')}, "
        f"{done.num_tokens:,} tokens ({done.num_bytes / max(1, done.num_tokens):.2f} bytes each), "
        f"{size(done.num_bytes)} in {human_time(done.seconds)} ({speed(done)})"
    ]
    if done.num_empty:
        lines.append(f"left out {count(done.num_empty, 'empty document')}")
    if done.num_broken:
        lines.append(f"left out {count(done.num_broken, 'broken document')} (--errors skip)")
    return Report(facts, lines)


def merge(prefixes: Sequence[str], output: str, overwrite: bool, console: Console) -> Report:
    """Make one data set of several (see `merge_datasets`)."""
    meta = merge_datasets(prefixes, output, overwrite)
    facts = {
        "output": output,
        "documents": meta.num_documents,
        "sequences": meta.num_sequences,
        "tokens": meta.num_tokens,
        "tokenizer": meta.tokenizer,
    }
    counts = f"{count(meta.num_documents, 'document')}, {meta.num_tokens:,} tokens"
    return Report(facts, [f"wrote {output}.bin and .idx: {counts} of {count(len(prefixes), 'data set')}"])
