"""Random SIGSTOPs of random ranks: each is found within 10 s, with the right rank, and once continued the run goes on.

`MEGACORE_STOPS=50 pytest -m slow -s tests/train/test_stops.py` stops as often as that.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from megacore.checkpoint.find import folder_of, step_of
from megacore.checkpoint.manifest import MANIFEST
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS, METRICS
from tests.train.runs import words_of
from tests.train.test_standstill import hangs
from tests.train.test_stopping import ranks_of, wait_for

FOUND_S = 10.0
GOES_ON_S = 20.0
LAYOUTS = {
    "tp": ("2", "parallel.tp=2", "parallel.sequence_parallel=true"),
    "two stages": ("2", "parallel.pp=2", "checkpoint.async_save=false"),
    "zero3": ("2", "parallel.zero=3"),
    "tp, dp": ("4", "parallel.tp=2", "parallel.zero=1"),
    "pp, dp": ("4", "parallel.pp=2", "parallel.schedule=zb-h1", "parallel.zero=2"),
    "four stages": ("4", "parallel.pp=4", "model.num_layers=4", "checkpoint.async_save=false"),
}
STOPS = int(os.environ.get("MEGACORE_STOPS", str(len(LAYOUTS))))
BUSY = (
    "train.steps=1000000",
    "optim.decay_steps=6",
    "train.eval_every=20",
    "train.eval_steps=10",
    "checkpoint.save_every=30",
)


def last_step(out: Path) -> int:
    """The last step that is written down so far, 0 if there is none."""
    try:
        return max((record["step"] for record in read_json_lines(out / METRICS)), default=0)
    except FileNotFoundError:
        return 0


def unfinished(out: Path) -> bool:
    """Whether a checkpoint is being written."""
    folders = (out / "checkpoints").glob("step-*")
    return any(step_of(each.name) is not None and not (each / MANIFEST).exists() for each in folders)


def wait_for_moment(what: str, out: Path, generator: random.Random) -> None:
    """Until it is time to stop a rank: at once, while a checkpoint is written, or at a random moment."""
    deadline = time.monotonic() + 5
    while what == "save" and not unfinished(out) and time.monotonic() < deadline:
        time.sleep(0.001)
    if what == "any":
        time.sleep(generator.uniform(0.0, 2.0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whoever_is_stopped_is_found(layout: str, letters: str, tmp_path: Path) -> None:
    generator, stops = random.Random(f"stops {layout}"), -(-STOPS // len(LAYOUTS))
    ranks, *words = LAYOUTS[layout]
    took: list[float] = []
    doing: Counter[str] = Counter()
    command = [sys.executable, "-m", "megacore", "train", *words_of(letters, tmp_path, "--nproc", ranks, *BUSY, *words)]
    with (tmp_path / "said").open("w") as said:  # stacks, more than a pipe holds
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
    try:
        wait_for(tmp_path / EVENTS, 300.0)
        for number in range(stops):
            # the first comes before the first step, or among the first ones
            wait_for_moment("start" if not number else generator.choice(("save", "any", "any")), tmp_path, generator)
            rank = generator.randrange(int(ranks))
            before, victim = len(hangs(tmp_path)), ranks_of(process.pid)[rank]
            stopped = time.time()
            os.kill(victim, signal.SIGSTOP)
            try:
                while len(found := hangs(tmp_path)) == before and time.time() < stopped + 2 * FOUND_S:
                    time.sleep(0.05)
            finally:
                os.kill(victim, signal.SIGCONT)
            assert [each["rank"] for each in found[before:]] == [rank], (number, found[before:])
            assert found[-1]["kind"] == "silent"
            took.append(found[-1]["time"] - stopped)
            doing[found[-1]["text"].rpartition(" in ")[2].partition(" ")[0].strip(",")] += 1
            step, deadline = last_step(tmp_path), time.monotonic() + GOES_ON_S
            while last_step(tmp_path) <= step + 1 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert last_step(tmp_path) > step + 1, f"after stop {number} of rank {rank} the run does not go on"
            assert process.poll() is None and len(hangs(tmp_path)) == before + 1, "nobody else is blamed"
        process.terminate()
        assert process.wait(60) == 75
        assert (tmp_path / "checkpoints" / folder_of(last_step(tmp_path)) / MANIFEST).exists()
    finally:
        process.kill()
        process.wait()
    assert max(took) < FOUND_S
    print(
        f"{layout} on {ranks} ranks: {stops} stops, found after {statistics.median(took):.1f} s (median), "
        f"{max(took):.1f} s (worst); stopped in {dict(doing)}, step {last_step(tmp_path)}"
    )
