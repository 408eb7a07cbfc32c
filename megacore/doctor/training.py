"""A training run of some seconds through the very command that users type: whether it learns, and repeats itself."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megacore.data.indexed import IndexedWriter
from megacore.doctor.finding import FAIL, OK, Finding
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import METRICS

STEPS = 20
BATCH = 4
"""Samples per rank and step."""
BOX, FRAME = "╭", "╭╮╰╯│─ "
TEXT = b"the quick brown fox jumps over the lazy dog. "
TIMEOUT_S = 120.0
MIN_FALL = 0.5
"""Of the loss, in nats: this text repeats itself, so much is learnt at once."""


def trains(folder: Path, nproc: int, device: str) -> Iterator[Finding]:
    """Twice the same small run, tensor-parallel over pairs of ranks if they come in pairs; files go to ``folder``."""
    import numpy as np

    prefix = str(folder / "text")
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(200):
            writer.add_document([*TEXT * 4, 256])
    began = time.monotonic()
    runs = [one_run(folder / str(number), prefix, nproc, device) for number in range(2)]
    seconds = time.monotonic() - began
    for each in runs:
        if isinstance(each, str):
            yield Finding("training", FAIL, each, "run it by hand: megacore train --preset demo --nproc 2")
            return
    first, second = ([record["loss"] for record in each] for each in runs if not isinstance(each, str))
    ranks = f"{nproc} ranks" if nproc > 1 else "one rank"
    if first[0] - first[-1] < MIN_FALL:
        text = f"the loss went from {first[0]:.3f} to {first[-1]:.3f} in {STEPS} steps: it does not learn"
        yield Finding("training", FAIL, text, "megacore verify says which layouts compute something else")
    elif first != second:
        text = f"two runs of the same {STEPS} steps gave other losses ({first[-1]!r} and {second[-1]!r})"
        yield Finding("training", FAIL, text, "suspect the memory or a GPU of this machine; run it again elsewhere")
    else:
        text = (
            f"loss {first[0]:.2f} to {first[-1]:.2f} in {STEPS} steps on {ranks}, twice the same bits, {seconds:.0f} s"
        )
        yield Finding("training", OK, text)


def one_run(out: Path, prefix: str, nproc: int, device: str) -> list[dict[str, float]] | str:
    """The metrics of a run, or why there are none."""
    tp = 2 if nproc % 2 == 0 else 1
    words = [
        *("--preset", "demo", f"data.blend={prefix}", "data.tokenizer=bytes", "data.split=1,0,0", f"out={out}"),
        *("model.num_layers=2", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=2"),
        *("model.vocab_size=257", "model.ffn_hidden_size=128", "model.dropout=0"),
        *(f"train.steps={STEPS}", "train.seq_len=64", f"train.micro_batch_size={BATCH}"),
        *(f"train.global_batch_size={BATCH * nproc}", "train.eval_every=0", f"train.device={device}"),
        *("optim.lr=0.01", "optim.warmup_steps=2"),
        *("checkpoint.save_every=0", "log.sample_every=0", "log.every=1"),
        *(f"parallel.tp={tp}", "--nproc", str(nproc)),
    ]
    command = [sys.executable, "-m", "megacore", "train", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"a run of {STEPS} small steps did not end within {TIMEOUT_S:.0f} s"
    if done.returncode:
        return f"exit code {done.returncode}: {cause_in(done.stderr)}"
    return read_json_lines(out / METRICS)


def cause_in(stderr: str) -> str:
    """A line of what a run said at its end: the head of its last box (launch/failures.py), or its last words."""
    lines = stderr.strip().splitlines()
    box = max((number for number, line in enumerate(lines) if line.startswith(BOX)), default=None)
    told = lines[-3:] if box is None else lines[box : box + 4]
    return " ".join(" ".join(line.strip(FRAME) for line in told).split())
