"""Ranks that are stopped while they train: named within seconds, and the run goes on."""

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megacore.checkpoint.find import LATEST
from megacore.config.schema import RunConfig
from megacore.launch.failures import Failure
from megacore.launch.processes import run_local
from megacore.launch.restarts import with_restarts
from megacore.launch.train import parser, requested
from megacore.monitor.run_folder import EVENTS, METRICS
from tests.train.runs import events, figures, words_of
from tests.train.straying import SEND, STEP, SUM, TARGET
from tests.train.test_stopping import ranks_of, wait_for


def start(out: Path, letters: str, *more: str) -> "subprocess.Popen[str]":
    words = words_of(letters, out, "--nproc", "2", "optim.decay_steps=6", "train.eval_every=0", *more)
    command = [sys.executable, "-m", "megacore", "train", *words]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def hangs(out: Path) -> list[dict[str, Any]]:
    return events(out, "hang") if (out / EVENTS).exists() else []


@pytest.mark.slow
def test_a_stopped_rank_is_named_ended_and_the_run_goes_on(letters: str, tmp_path: Path) -> None:
    more = ("guard.silent_s=4", "guard.abort_s=6", "train.steps=400", "checkpoint.save_every=20", "parallel.zero=1")
    process = start(tmp_path, letters, *more)
    wait_for(tmp_path / "checkpoints" / LATEST)
    os.kill(ranks_of(process.pid)[1], signal.SIGSTOP)
    assert process.wait(120) == 0
    (hang,) = hangs(tmp_path)
    assert (hang["kind"], hang["rank"]) == ("silent", 1)
    assert process.stderr is not None
    error = process.stderr.read()
    assert "rank 1" in error and "has been silent for 4 s" in error and "starting again" in error
    assert "loop.py" in error, "the stack of the rank that waits for it"
    assert [figure["step"] for figure in figures(tmp_path)] == list(range(1, 401))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2", "parallel.zero=3"])
def test_found_within_ten_seconds(layout: str, rank: int, letters: str, tmp_path: Path) -> None:
    """With the usual limits, whichever rank it is; once it goes on, so does the run."""
    process = start(tmp_path, letters, layout, "train.steps=100000", "checkpoint.save_every=0")
    wait_for(tmp_path / METRICS)
    time.sleep(1)
    victim = ranks_of(process.pid)[rank]
    stopped = time.time()
    os.kill(victim, signal.SIGSTOP)
    while not (found := hangs(tmp_path)) and time.time() < stopped + 20:
        time.sleep(0.1)
    os.kill(victim, signal.SIGCONT)
    assert [each["rank"] for each in found] == [rank] and found[0]["time"] - stopped < 10
    before = len(figures(tmp_path))
    time.sleep(3)
    assert len(figures(tmp_path)) > before and len(hangs(tmp_path)) == 1
    process.terminate()
    assert process.wait(60) == 75


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "rank", "layout"),
    [
        (SUM, 1, ("parallel.tp=2",)),
        (SUM, 0, ("parallel.tp=2", "parallel.zero=1", "parallel.dp=2")),
        (SUM, 1, ("parallel.pp=4", "model.num_layers=4")),
        (SUM, 2, ("parallel.pp=4", "model.num_layers=4")),
        (SEND, 0, ("parallel.pp=2",)),
        (SEND, 2, ("parallel.pp=4", "model.num_layers=4")),
    ],
)
def test_a_rank_that_strays_is_named_and_the_run_goes_on(
    what: str, rank: int, layout: tuple[str, ...], letters: str, tmp_path: Path
) -> None:
    """Alive, but not where the others wait for it: named as late, with what it did last and where all stand; the ranks
    end after the limit of a step, and go on from the newest checkpoint as if nothing had been.

    Where a message was left out all wait, in a ring: which of them should have sent it is not known, and one is named.
    """
    limits = ("guard.silent_s=4", "guard.step_limit_s=8", "train.steps=12", "train.eval_every=0")
    words = words_of(letters, tmp_path, *limits, "checkpoint.save_every=3", *layout)
    sizes = [
        word.partition("=")[2] for word in layout if word.startswith(("parallel.tp", "parallel.pp", "parallel.dp"))
    ]
    ranks = math.prod(map(int, sizes))
    config, _ = requested(parser().parse_intermixed_args([*words, "--nproc", str(ranks)]), None)
    said: list[str] = []

    def attempt(config: RunConfig, tell: Callable[[Failure], None]) -> int:
        return run_local(TARGET, (config, rank, what), ranks, said.append, tell)

    assert with_restarts(config, attempt, write=said.append) == 0
    (hang,) = hangs(tmp_path)
    assert hang["kind"] == "late" and (hang["rank"] == rank or what == SEND), hang["text"]
    named = f"rank {hang['rank']} ("
    assert named in hang["text"] and f"step {STEP}, after " in hang["text"] and 4 <= hang["seconds"] < 8
    assert ("waits for nobody" in hang["text"]) == (what == SUM)
    (restart,) = events(tmp_path, "restart")
    assert restart["step"] == 6 and "starting again from step 6" in "".join(said)
    assert [figure["step"] for figure in figures(tmp_path)] == list(range(1, 13))


@pytest.mark.slow
def test_a_rank_that_is_stopped_by_turns_is_a_straggler(letters: str, tmp_path: Path) -> None:
    """It runs four parts in ten of its time, in slices of 50 ms: named, and nobody else, while nobody is silent."""
    process = start(
        tmp_path,
        letters,
        "parallel.dp=2",
        "train.steps=100000",
        "checkpoint.save_every=0",
        "guard.stragglers_every=5",
        "train.seq_len=256",
        "model.hidden_size=128",
        "train.global_batch_size=16",
    )
    wait_for(tmp_path / METRICS)
    victim, until = ranks_of(process.pid)[1], time.monotonic() + 20
    try:
        while time.monotonic() < until:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.05)
            os.kill(victim, signal.SIGCONT)
            time.sleep(0.033)
    finally:
        os.kill(victim, signal.SIGCONT)
        process.terminate()
    assert process.wait(60) == 75
    named = Counter(each["rank"] for each in events(tmp_path, "straggler"))
    assert named[1] >= 3 and named[1] > 3 * named[0], named
    assert "rank 1 (" in events(tmp_path, "straggler")[0]["text"] and not hangs(tmp_path)
