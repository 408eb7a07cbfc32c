"""Random kills of ranks and of the launcher: the run ends as if there were none, and every sample is accounted for.

`MEGACORE_KILLS=200 pytest -m slow tests/train/test_chaos.py` kills as often as that.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megacore.launch.train import main
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS, METRICS
from tests.train.runs import figures, last_state, words_of
from tests.train.test_stopping import ranks_of

KILLS = int(os.environ.get("MEGACORE_KILLS", "8"))
SAVE_EVERY, STEPS_PER_KILL, BATCH = 10, 60, 8
LAYOUTS = {
    "tp": ("parallel.tp=2", "parallel.sequence_parallel=true"),
    "pp": ("parallel.pp=2", "parallel.schedule=zb-h1"),
    "zero3": ("parallel.zero=3",),
}


def accounted(out: Path, steps: int) -> int:
    """Check that events.jsonl tells what became of each sample; returns the samples that were trained on twice."""
    events, taken, again = read_json_lines(out / EVENTS), 0, 0
    saved = {0: 0}
    for event in events:
        if event["event"] == "save":
            saved[event["step"]] = event["samples"]
        if event["event"] == "start":
            assert event["samples"] == BATCH * (event["first_step"] - 1) and event["samples"] <= taken
            taken = event["samples"]
        if event["event"] == "resume":
            assert event["samples"] == BATCH * event["step"], "it goes on where a checkpoint ended"
            again += event["again_until_sample"] - event["samples"]
            assert event["again_until_sample"] >= event["samples"]
        if event["event"] in ("save", "finish", "stop"):
            taken = max(taken, event["samples"])
    assert events[-1]["event"] == "finish" and events[-1]["samples"] == BATCH * steps
    assert [each["step"] for each in read_json_lines(out / METRICS)] == list(range(1, steps + 1))
    return again


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_kills_change_nothing(layout: str, letters: str, tmp_path: Path) -> None:
    generator, kills = random.Random(layout), max(1, KILLS // len(LAYOUTS))
    steps = kills * STEPS_PER_KILL
    settings = (
        f"train.steps={steps}",
        "train.eval_every=0",
        f"checkpoint.save_every={SAVE_EVERY}",
        "log.console_every=1000",
    )
    more = (*LAYOUTS[layout], *settings, "--nproc", "2")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert main(words_of(letters, whole, *more)) == 0

    command = [sys.executable, "-m", "megacore", "train", *words_of(letters, out, *more), "--max-restarts", "50"]
    done: dict[str, int] = {"rank": 0, "launcher": 0}
    process = start(command)
    while sum(done.values()) < kills and process.poll() is None:
        before = last_step(out)
        deadline = time.monotonic() + generator.uniform(2, 20)  # some die before they get anywhere
        while last_step(out) == before and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        time.sleep(generator.uniform(0.0, 1.0))
        what = generator.choice(("rank", "rank", "launcher"))
        ranks = ranks_of(process.pid)
        victim = process.pid if what == "launcher" else generator.choice(ranks) if ranks else 0
        if not victim or process.poll() is not None:
            continue
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
        done[what] += 1
        if what == "launcher":
            process.wait()
            process = start(command)
    assert process.wait(900) == 0
    assert min(done.values()) > 0 or kills < 4, done
    assert figures(out) == figures(whole)
    assert last_state(out, steps) == last_state(whole, steps)
    again = accounted(out, steps)
    print(f"{layout}: {done} kills, {again} samples trained again of {BATCH * steps}")


def last_step(out: Path) -> int:
    """The last step that is written down so far, 0 if there is none."""
    try:
        return max((record["step"] for record in read_json_lines(out / METRICS)), default=0)
    except FileNotFoundError:
        return 0


def start(command: list[str]) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
