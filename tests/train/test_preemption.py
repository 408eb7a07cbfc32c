"""Random SIGTERMs and SIGUSR1s to a rank, all ranks, the launcher or the whole job, once or twice in a row: the run
leaves with 75 within its grace, no finished step is lost, and the end is that of a run that nobody interrupted.

`MEGACORE_TERMS=50 pytest -m slow -s tests/train/test_preemption.py` asks as often as that.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from megacore.checkpoint.find import steps_in
from megacore.checkpoint.store import open_store
from megacore.exits import STOPPED
from megacore.launch.train import main
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS
from tests.train.runs import events, figures, last_state, words_of
from tests.train.test_stopping import ranks_of
from tests.train.test_stops import last_step, unfinished

GRACE_S, STEPS, BATCH = 30.0, 150, 8
SETTINGS = (
    f"train.steps={STEPS}",
    "train.eval_every=20",
    "train.eval_steps=4",
    "checkpoint.save_every=10",
    "log.console_every=1000",
)
LAYOUTS = {
    "tp": ("2", "parallel.tp=2", "parallel.sequence_parallel=true"),
    "pp": ("2", "parallel.pp=2", "parallel.schedule=zb-h1", "checkpoint.async_save=false"),
    "zero3": ("2", "parallel.zero=3"),
    "tp, dp": ("4", "parallel.tp=2", "parallel.zero=1"),
}
TERMS = int(os.environ.get("MEGACORE_TERMS", str(2 * len(LAYOUTS))))
WHO = ("one rank", "all ranks", "launcher", "whole job")
"""The whole job: every process of its group, as a scheduler sends it, the fork server too."""
WHEN = ("start-up", "steps", "steps", "save")


def send(number: int, who: str, process: "subprocess.Popen[bytes]", generator: random.Random) -> None:
    """One signal; whoever has left meanwhile does not get it."""
    ranks = ranks_of(process.pid)
    targets = {"one rank": [generator.choice(ranks)] if ranks else [], "all ranks": ranks, "launcher": [process.pid]}
    with suppress(ProcessLookupError):
        if who == "whole job":
            os.killpg(process.pid, number)
        for pid in targets.get(who, ()):
            os.kill(pid, number)


def wait_for_moment(when: str, out: Path, process: "subprocess.Popen[bytes]", generator: random.Random) -> None:
    """Until it is time for a signal: while ranks start, while a checkpoint is written, or at a random moment."""
    before, deadline = last_step(out), time.monotonic() + 60
    while not ranks_of(process.pid) and process.poll() is None:
        time.sleep(0.01)
    if when == "start-up":
        time.sleep(generator.uniform(0.0, 4.0))
        return
    while last_step(out) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    while when == "save" and not unfinished(out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    if when == "steps":
        time.sleep(generator.uniform(0.0, 1.0))


def check_nothing_lost(out: Path) -> None:
    """What metrics.jsonl shows is what the newest checkpoint holds."""
    finished = [step for step, _, is_finished in steps_in(open_store(str(out / "checkpoints"))) if is_finished]
    assert max(finished, default=0) == last_step(out), "a finished step is in no checkpoint"
    assert [each["step"] for each in figures(out)] == list(range(1, last_step(out) + 1)) if finished else True


def check_accounts(out: Path) -> None:
    """events.jsonl tells of every sample, and none was trained on twice."""
    taken = 0
    for event in read_json_lines(out / EVENTS):
        if event["event"] == "start":
            assert event["samples"] == taken == BATCH * (event["first_step"] - 1)
        if event["event"] == "resume":
            assert event["samples"] == event["again_until_sample"] == BATCH * event["step"]
        if event["event"] in ("stop", "finish", "save"):
            taken = event["samples"]
    assert taken == BATCH * STEPS and len(events(out, "finish")) == 1
    assert not events(out, "fault") and not events(out, "restart")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_finished_step_is_lost(layout: str, letters: str, tmp_path: Path) -> None:
    generator, terms = random.Random(f"terms {layout}"), -(-TERMS // len(LAYOUTS))
    ranks, *words = LAYOUTS[layout]
    whole = tmp_path / "whole"
    assert main(words_of(letters, whole, "--nproc", ranks, *SETTINGS, *words)) == 0
    done, codes, slowest, runs = Counter[str](), Counter[int](), 0.0, 0
    while sum(done.values()) < terms:
        out, runs = tmp_path / f"run-{runs}", runs + 1
        command = [sys.executable, "-m", "megacore", "train", *words_of(letters, out, "--nproc", ranks), *SETTINGS]
        code = STOPPED
        while code == STOPPED:
            process = start([*command, *words])
            if sum(done.values()) < terms:
                who, number = generator.choice(WHO), generator.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1))
                when, twice = generator.choice(WHEN), generator.random() < 0.5
                wait_for_moment(when, out, process, generator)
                asked = time.monotonic()
                send(number, who, process, generator)
                if twice:
                    time.sleep(generator.choice((0.0, 0.05, generator.uniform(0.0, 1.5))))
                    send(number, who, process, generator)
                code = process.wait(2 * GRACE_S)
                slowest = max(slowest, time.monotonic() - asked)
                what = f"{signal.Signals(number).name}{' twice' * twice} to {who} in {when}"
                assert code in (STOPPED, 0), f"{what}: {code}"
                check_nothing_lost(out)
                done[what] += code == STOPPED
                codes[code] += 1
            else:
                code = process.wait(300)
        assert code == 0
        assert figures(out) == figures(whole)
        assert last_state(out, STEPS) == last_state(whole, STEPS)
        check_accounts(out)
    assert slowest < GRACE_S
    print(f"{layout} on {ranks} ranks: {dict(done)} in {runs} runs, left after {slowest:.1f} s at most; codes {codes}")


def start(command: list[str]) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
