"""Ranks that are stopped while they train: named within seconds, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megacore.checkpoint.find import LATEST
from megacore.monitor.run_folder import EVENTS, METRICS
from tests.train.runs import events, figures, words_of
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
