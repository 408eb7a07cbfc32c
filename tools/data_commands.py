"""What the subcommands of `megacore data` do and print: results on stdout, progress on stderr."""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from types import FrameType
from typing import Any, NoReturn

from megacore.config.schema import DataConfig
from megacore.data.inspection import inspect
from megacore.data.merging import merge_datasets
from megacore.data.prepare import Progress, prepare
from megacore.data.stream import SampleStream
from megacore.data.text.options import ReadOptions
from megacore.data.train_tokenizer import train_sentencepiece
from megacore.monitor.console import Console, bar, human_count, human_time

LOG_SECONDS = 10.0  # between two progress lines in a log
SCREEN_SECONDS = 0.1  # between two updates of a terminal's line


def run_tokenizer(arguments: argparse.Namespace) -> int:
    """Train a tokenizer and show what came out."""
    if arguments.sample_mb <= 0:
        raise ValueError(f"--sample-mb {arguments.sample_mb} must be above 0; leave it out for 64")
    console = _console(sys.stderr)
    special = arguments.special_token or list(DataConfig().fim_tokens)
    started = time.monotonic()
    trained = train_sentencepiece(
        arguments.input,
        arguments.output,
        arguments.vocab_size,
        _read_options(arguments),
        sample_bytes=int(arguments.sample_mb * 1e6),
        special_tokens=special,
        overwrite=arguments.overwrite,
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
    if arguments.json:
        _print_json(facts)
        return 0
    print(
        f"wrote {tokenizer.spec}: {tokenizer.vocab_size:,} tokens, {trained.bytes_per_token:.2f} bytes of text per "
        f"token, {human_time(time.monotonic() - started)}"
    )
    print(f"next: megacore data prepare --input FILE... --tokenizer {tokenizer.spec} --output PREFIX")
    return 0


def run_prepare(arguments: argparse.Namespace) -> int:
    """Tokenise files and say how much came out."""
    signal.signal(signal.SIGTERM, _leave)  # so that temporary files are cleared away
    display = ProgressDisplay(_console(sys.stderr))
    progress = prepare(
        arguments.input,
        arguments.tokenizer,
        arguments.output,
        _read_options(arguments),
        workers=arguments.workers or len(os.sched_getaffinity(0)),
        append_eod=not arguments.no_eod,
        eod_token=arguments.eod_token,
        overwrite=arguments.overwrite,
        on_progress=display.update,
    )
    display.console.close()
    if arguments.json:
        _print_json(
            {
                "output": arguments.output,
                "documents": progress.num_documents,
                "tokens": progress.num_tokens,
                "bytes": progress.num_bytes,
                "seconds": progress.seconds,
                "empty": progress.num_empty,
                "broken": progress.num_broken,
            }
        )
        return 0
    print(
        f"wrote {arguments.output}.bin and .idx: {_count(progress.num_documents, 'document')}, "
        f"{progress.num_tokens:,} tokens ({progress.num_bytes / max(1, progress.num_tokens):.2f} bytes each), "
        f"{_size(progress.num_bytes)} in {human_time(progress.seconds)} ({_speed(progress)})"
    )
    if progress.num_empty:
        print(f"left out {_count(progress.num_empty, 'empty document')}")
    if progress.num_broken:
        print(f"left out {_count(progress.num_broken, 'broken document')} (--errors skip)")
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    """Show a data set; 2 if something is wrong with it."""
    found = inspect(arguments.prefix, arguments.samples, arguments.full)
    facts = found.facts
    if arguments.json:
        _print_json({**facts, "samples": found.samples, "problems": found.problems})
    else:
        for name, value in _inspection_rows(facts):
            print(f"{name:<12}{value}")
        for number, sample in enumerate(found.samples, 1):
            print(f"sample {number:<5}{sample!r}")
    for problem in found.problems:
        print(f"megacore: {arguments.prefix}: {problem}", file=sys.stderr)
    return 2 if found.problems else 0


def run_merge(arguments: argparse.Namespace) -> int:
    """Merge data sets and say how much came out."""
    signal.signal(signal.SIGTERM, _leave)
    meta = merge_datasets(arguments.prefixes, arguments.output, arguments.overwrite)
    if arguments.json:
        _print_json(
            {
                "output": arguments.output,
                "documents": meta.num_documents,
                "sequences": meta.num_sequences,
                "tokens": meta.num_tokens,
                "tokenizer": meta.tokenizer,
            }
        )
    else:
        counts = f"{_count(meta.num_documents, 'document')}, {meta.num_tokens:,} tokens"
        print(f"wrote {arguments.output}.bin and .idx: {counts} of {_count(len(arguments.prefixes), 'data set')}")
    return 0


def run_index(arguments: argparse.Namespace) -> int:
    """Build what a run's samples will need and say where it lies."""
    for name, value in (("seq-len", arguments.seq_len), ("samples", arguments.samples)):
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1; take the run's (train.seq_len; steps x batch size)")
    config = DataConfig(
        blend=((1.0, arguments.prefix),),
        split=_shares(arguments.shares),
        index=arguments.order,
        cache=arguments.cache,
    )
    console = _console(sys.stderr)
    started = time.monotonic()
    stream = SampleStream(
        config,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        num_samples=arguments.samples,
        split=arguments.split,
        notify=console.line,
    )
    stream.build()
    source = stream.sources[0]
    facts = {
        "prefix": arguments.prefix,
        "split": arguments.split,
        "sequences": source.last - source.first,
        "tokens": source.num_tokens,
        "samples": arguments.samples,
        "epochs": arguments.samples * arguments.seq_len / source.num_tokens,
        "cache": str(source.cache_folder(config)),
        "seconds": time.monotonic() - started,
    }
    if arguments.json:
        _print_json(facts)
    else:
        print(
            f"{arguments.samples:,} samples of {arguments.seq_len:,} tokens: {facts['epochs']:.2f} epochs of "
            f"{human_count(source.num_tokens)} tokens in {_count(facts['sequences'], 'document')} "
            f"({human_time(facts['seconds'])}); large tables are kept in {facts['cache']}"
        )
    return 0


class ProgressDisplay:
    """Shows how far a preparation is: one changing line on a terminal, a line now and then in a log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.next_time = 0.0 if console.live else LOG_SECONDS

    def update(self, progress: Progress) -> None:
        """Take the news; draws only as often as a person can read."""
        if progress.seconds < self.next_time:
            return
        self.next_time = progress.seconds + (SCREEN_SECONDS if self.console.live else LOG_SECONDS)
        if self.console.live:
            self.console.progress(progress_line(progress, bar_width=20))
        else:
            self.console.line(progress_line(progress, bar_width=0))


def progress_line(progress: Progress, bar_width: int) -> str:
    """`[####    ]  42%  1,234 documents  56.7M tokens  12.3 MB/s  ETA 1m02s`; without a share for a pipe."""
    parts = [_count(progress.num_documents, "document"), f"{human_count(progress.num_tokens)} tokens", _speed(progress)]
    if progress.total:
        share = min(1.0, progress.consumed / progress.total)
        drawn = f"{bar(share, bar_width):<{bar_width}}" if bar_width else ""
        parts.insert(0, f"{drawn}{share:4.0%}")
        if share > 0:
            parts.append(f"ETA {human_time(progress.seconds * (1 - share) / share)}")
    return "  ".join(parts)


def _inspection_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    unknown = "not noted (made by another tool)"
    of_vocabulary = f" of {facts['vocab_size']:,}" if facts["vocab_size"] else ""
    largest = "-" if facts["max_id"] is None else f"{facts['max_id']:,}{of_vocabulary}"
    empty = f" ({facts['empty_documents']:,} empty)" if facts["empty_documents"] else ""
    lengths = f"{facts['shortest']:,} to {facts['longest']:,} tokens, {facts['mean']:,.1f} on average"
    return [
        ("data set", f"{facts['prefix']} ({_size(facts['bytes'])})"),
        ("documents", f"{facts['documents']:,}{empty}"),
        ("sequences", f"{facts['sequences']:,}"),
        ("tokens", f"{facts['tokens']:,} ({facts['dtype']})"),
        ("lengths", lengths),
        ("largest id", f"{largest} ({facts['checked']:.0%} of the tokens checked)"),
        ("tokenizer", facts["tokenizer"] or unknown),
        ("vocabulary", f"{facts['vocab_size']:,}" if facts["vocab_size"] else unknown),
        ("end token", "none" if facts["eod"] is None else str(facts["eod"])),
    ]


def _read_options(arguments: argparse.Namespace) -> ReadOptions:
    return ReadOptions(arguments.format, arguments.json_key, arguments.documents, arguments.errors)


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as reason:
        raise ValueError(f"--shares {text} must be numbers with commas between them, such as 969,30,1") from reason


def _console(stream: Any) -> Console:
    return Console(stream, colour=stream.isatty(), width=shutil.get_terminal_size((100, 24)).columns)


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _size(num_bytes: int) -> str:
    return f"{human_count(num_bytes)}B"


def _speed(progress: Progress) -> str:
    return f"{progress.num_bytes / 1e6 / max(progress.seconds, 1e-9):.1f} MB/s"
