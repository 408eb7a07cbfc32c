"""Small runs from the command line, whole or interrupted, and what they write down."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacore.config.schema import RunConfig
from megacore.data.indexed import IndexedWriter
from megacore.exits import run
from megacore.launch.train import main, parser, requested
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS, METRICS
from megacore.train.failpoints import VARIABLE, Provoked
from tests.checkpoint.common import digests

EOD, STEPS = 256, 6
BASE = (
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=24",
    "model.num_heads=4",
    "model.num_kv_heads=1",
    "model.dropout=0.1",
    "data.tokenizer=bytes",
    "data.split=8,2,0",
    "train.seq_len=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    f"train.steps={STEPS}",
    "train.eval_every=2",
    "train.eval_steps=2",
    "train.device=cpu",
    "optim.lr=0.01",
    "optim.warmup_steps=2",
    "precision.dtype=fp64",
    "checkpoint.save_every=2",
)
FEATURES = {
    "plain": (),
    "ramp": (
        "train.batch_ramp=4,4,8",
        "optim.clip=adagc",
        "optim.adagc_warmup_steps=1",
        "log.every=2",
        "checkpoint.async_save=false",
    ),
}
LAYOUTS = {
    "tp": ("parallel.tp=2", "parallel.sequence_parallel=true"),
    "zero": ("parallel.dp=2", "parallel.zero=3"),
    "pp": ("parallel.pp=2", "parallel.schedule=zb-v"),
}


def write_corpus(prefix: str, seed: int) -> str:
    """Letters in documents of uneven length, many times more than a run reads."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in generator.integers(3, 40, 300):
            writer.add_document([*generator.choice([97, 98, 99], length, p=(0.7, 0.2, 0.1)), EOD])
    return prefix


def words_of(data: str, out: Path, *words: str) -> list[str]:
    return ["--preset", "demo", *BASE, f"data.blend={data}", f"out={out}", *words]


def figures(out: Path) -> list[dict[str, Any]]:
    """What must not depend on the machine, nor on how often a run was interrupted."""
    names = ("step", "loss", "grad_norm", "val_loss", "lr", "tokens", "skipped")
    return [{name: each[name] for name in names if name in each} for each in read_json_lines(out / METRICS)]


def events(out: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_json_lines(out / EVENTS) if event["event"] == name]


def last_state(out: Path, step: int = STEPS) -> dict[str, str]:
    return digests(str(out / "checkpoints"), step)


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int, words: list[str]) -> None:
    """Start a run of one process that ends with a fault before a step."""
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, f"step:0:{step}:raise")
        with pytest.raises(Provoked):
            main(words)


def killed(fault: str, words: list[str], *, max_restarts: int = 0) -> str:
    """Start a run in a process of its own, which a signal ends, or one of its ranks; what it said of it."""
    command = [sys.executable, "-m", "megacore", "train", *words, "--max-restarts", str(max_restarts)]
    environment = os.environ | {VARIABLE: fault, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode not in (0, 2), done.stderr
    return done.stderr


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    """Start a run that is refused; what it says, all of it before anything is trained."""
    capsys.readouterr()
    assert run("megacore.launch.train", words) == code
    error = capsys.readouterr().err
    assert ("Traceback" in error) == (code == 1)
    return error


def requested_by(words: list[str], world_size: int) -> RunConfig:
    """The checked and resolved run of a command line, for so many ranks."""
    return requested(parser().parse_intermixed_args([*words, "--nproc", str(world_size)]), None)[0]
