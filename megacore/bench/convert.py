"""Conversion as whole commands: `megacore convert` against `from_pretrained` and `save_pretrained` of transformers.

Both sides read an HF folder of random weights and write all of them anew, in the same format; each run is a process of
its own, start-up included, and they take turns. The peak of memory is that of all processes of a side together.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree

import torch
from torch import Tensor

from megacore.bench.harness import Comparison, alternate, comparison
from megacore.bench.train import OURS
from megacore.checkpoint.hf.export import export
from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig, RunConfig

RIVAL = "transformers"
SHAPE = (
    "model.num_layers=16",
    "model.hidden_size=2048",
    "model.ffn_hidden_size=5632",
    "model.num_heads=16",
    "model.num_kv_heads=4",
    "model.vocab_size=32000",
)
"""A Llama of 880 million parameters: 1.8 GB in bf16."""

THEIRS = """
import os, sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
for entry in os.scandir(sys.argv[2]):
    with open(entry, "rb") as file:
        os.fsync(file.fileno())
"""
"""Ours is on disk when the command ends, so theirs must be."""


@dataclass(frozen=True)
class Case:
    """A direction, and how many processes of ours share the work."""

    command: str
    workers: int

    @property
    def name(self) -> str:
        return f"{self.command}-{self.workers}"


CASES = (Case("from-hf", 1), Case("from-hf", 2), Case("to-hf", 1), Case("to-hf", 2))


class RandomWeights:
    """A ``WeightSource`` of bf16 numbers that are made when they are read."""

    what = "random weights"

    def __init__(self, model: ModelConfig) -> None:
        self.model = resolve_model(model, 4096)
        self.attachments: dict[str, bytes] = {}

    def dtype(self, name: str) -> torch.dtype:
        """As ``WeightSource.dtype``."""
        return torch.bfloat16

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """As ``WeightSource.read``."""
        return torch.empty(tuple(size)).normal_(std=0.02).to(torch.bfloat16)


def measure(case: Case, config: RunConfig, rounds: int, folder: Path) -> Comparison:
    """Time a case. Raises ValueError where transformers is not installed."""
    if not find_spec("transformers"):
        raise ValueError("nothing to compare with: transformers is not installed; pip install 'megacore[hf]'")
    hf, ours = folder / "hf", folder / "checkpoint"
    if not hf.exists():
        export(RandomWeights(replace(config.model)), str(hf))
        run([*command("from-hf"), str(hf), str(ours)])
    source = hf if case.command == "from-hf" else ours
    target = folder / "out"
    peaks: dict[str, int] = {OURS: 0, RIVAL: 0}

    def timed(side: str, words: list[str]) -> Callable[[], object]:
        def call() -> None:
            peaks[side] = max(peaks[side], run(words))

        return call

    calls = {
        OURS: timed(OURS, [*command(case.command), str(source), str(target), "--workers", str(case.workers)]),
        RIVAL: timed(RIVAL, [sys.executable, "-c", THEIRS, str(hf), str(target)]),
    }
    seconds = alternate(calls, rounds, warmup=1, before=lambda: rmtree(target, ignore_errors=True))
    rmtree(target, ignore_errors=True)
    num_bytes = sum(file.stat().st_size for file in hf.iterdir())
    peak = {f"peak GB {side}": round(most / 1e9, 2) for side, most in peaks.items()}
    rates = {f"GB/s {side}": round(num_bytes / min(times) / 1e9, 2) for side, times in seconds.items()}
    return comparison(
        case.name, OURS, seconds, {"workers": case.workers, "GB": round(num_bytes / 1e9, 2), **rates, **peak}
    )


def command(name: str) -> list[str]:
    """How the command is called."""
    return [sys.executable, "-m", "megacore", "convert", name]


def run(words: list[str]) -> int:
    """Run a command to its end; the peak of memory of all its processes, in bytes.

    Raises RuntimeError where it fails.
    """
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        watch = _Watch(process.pid)
        _, errors = process.communicate()
        peak = watch.end()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {errors.decode(errors='replace')[-2000:]}")
    return peak


class _Watch(threading.Thread):
    """Adds up the memory of a process and all its descendants, again and again; Linux only, elsewhere 0."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.over = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            self.peak = max(self.peak, sum(map(_private_bytes, _tree(self.pid))))
            time.sleep(0.05)

    def end(self) -> int:
        self.over.set()
        self.join()
        return self.peak


def _tree(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        found.append(one := waiting.pop())
        try:
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                waiting += map(int, children.read_text().split())
        except OSError:
            continue  # it has just ended
    return found


def _private_bytes(pid: int) -> int:
    """Memory that is not a file's: pages of files that are read through a mapping can be given back at any time."""
    try:
        fields = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "kB" in line)
    except (OSError, ValueError):
        return 0
    return 1024 * sum(int(fields.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem"))
