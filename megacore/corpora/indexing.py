"""The subcommand that builds a run's sample index ahead."""

import time
from typing import Any

from megacore.config.schema import DataConfig
from megacore.corpora.report import Report, count
from megacore.data.stream import SampleStream
from megacore.monitor.console import Console, human_count, human_time


def build_index(
    prefix: str,
    seq_len: int,
    samples: int,
    seed: int,
    split: str,
    shares: str,
    order: str,
    cache: str,
    console: Console,
) -> Report:
    """Build what a run's samples will need and say where it lies."""
    for name, value in (("seq-len", seq_len), ("samples", samples)):
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1; take the run's (train.seq_len; steps x batch size)")
    config = DataConfig(blend=((1.0, prefix),), split=_numbers(shares), index=order, cache=cache)
    started = time.monotonic()
    stream = SampleStream(config, seq_len=seq_len, seed=seed, num_samples=samples, split=split, notify=console.line)
    stream.build()
    source = stream.sources[0]
    facts: dict[str, Any] = {
        "prefix": prefix,
        "split": split,
        "sequences": source.last - source.first,
        "tokens": source.num_tokens,
        "samples": samples,
        "epochs": samples * seq_len / source.num_tokens,
        "cache": str(source.cache_folder(config)),
        "seconds": time.monotonic() - started,
    }
    line = (
        f"{samples:,} samples of {seq_len:,} tokens: {facts['epochs']:.2f} epochs of "
        f"{human_count(source.num_tokens)} tokens in {count(facts['sequences'], 'document')} "
        f"({human_time(facts['seconds'])}); large tables are kept in {facts['cache']}"
    )
    return Report(facts, [line])


def _numbers(shares: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in shares.split(","))
    except ValueError as reason:
        raise ValueError(f"--shares {shares} must be numbers with commas between them, such as 969,30,1") from reason
