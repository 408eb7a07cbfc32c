"""Kills processes of small runs at random moments of every kind, and starts runs again as a scheduler would."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from megacore.checkpoint.read import WEIGHTS, Checkpoint
from tests.train.notes import Process, all_of, environment, read
from tests.train.test_stopping import ranks_of

MOMENTS = {"start-up": 3, "step": 5, "save": 4, "evaluation": 2, "shutdown": 2}
"""What is going on when somebody is killed, and how often out of all."""
KILLS_PER_RUN = 8
"""After so many a run is left to end, and another one begins."""
SILENCE_S = 180.0
"""A run in which nothing happens for so long has not gone on."""
SMALL = (
    *("train.micro_batch_size=1", "train.global_batch_size=4", "train.eval_every=5", "train.eval_steps=2"),
    *("checkpoint.save_every=3", "log.console_every=1000"),
)
BATCH = 4


class Run(Protocol):
    """A run that can be killed in several ways."""

    kinds: dict[str, int]
    """What can be killed, and how often out of all."""
    notes: Path

    def start(self) -> None:
        """By the command."""

    def over(self) -> bool:
        """Whether it has ended by itself."""

    def ranks(self) -> list[int]:
        """Processes that train."""

    def kill(self, what: str, chance: random.Random) -> bool:
        """Kill something other than a rank, and do what a scheduler does; False: nothing was there."""

    def log(self) -> str:
        """What it said."""

    def end(self) -> None:
        """Leave nothing running, however the test ends."""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def killed(pid: int) -> bool:
    """SIGKILL; False where nobody was left to be killed."""
    if not alive(pid):
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


class Local:
    """`megacore train` on this machine. Each new command may be given another layout."""

    def __init__(self, layouts: Sequence[tuple[str, ...]], words: Sequence[str], folder: Path) -> None:
        """``layouts``: overrides and --nproc, the next one after each kill of the launcher, round and round."""
        self.layouts, self.words, self.folder, self.starts = layouts, words, folder, 0
        self.notes = folder / "notes"
        self.environment = environment(self.notes)
        self.kinds = {"rank": 2, "launcher": 1} if len(layouts) == 1 else {"rank": 1, "launcher": 2}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        layout = self.layouts[self.starts % len(self.layouts)]
        self.starts += 1
        command = [sys.executable, "-m", "megacore", "train", *self.words, *layout, "--max-restarts", "50"]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def over(self) -> bool:
        assert self.process is not None
        code = self.process.poll()
        assert code in (None, 0), self.log()
        return code == 0

    def ranks(self) -> list[int]:
        assert self.process is not None
        return ranks_of(self.process.pid)

    def kill(self, what: str, chance: random.Random) -> bool:
        assert self.process is not None
        if not killed(self.process.pid):
            return False
        self.process.wait()
        self.start()
        return True

    def log(self) -> str:
        return (self.folder / "log").read_text()[-10_000:]

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Chaos:
    """Kills, at moments drawn from a seed, and what was hit."""

    def __init__(self, seed: str, startup_s: float) -> None:
        """``startup_s``: from the command to the first step, so that start-ups are hit all along."""
        self.chance, self.startup_s = random.Random(seed), startup_s
        self.hit: Counter[tuple[str, str]] = Counter()
        """By (rank, launcher or host; what the run was about)."""

    @property
    def kills(self) -> int:
        return sum(self.hit.values())

    def drawn(self, of: dict[str, int]) -> str:
        return self.chance.choices(list(of), list(of.values()))[0]

    def to_the_end(self, run: Run, kills: int) -> None:
        """Start a run, kill so often, and wait until it has ended well."""
        goal = self.kills + min(kills, KILLS_PER_RUN)
        try:
            run.start()
            since = time.time()
            while self.kills < goal and self.wait(run, since):
                since = time.time()
                if what := self.strike(run):
                    self.hit[what] += 1
                else:
                    since = 0.0  # too late: whatever is there now will do
            deadline = time.monotonic() + SILENCE_S
            while not run.over():
                assert time.monotonic() < deadline, run.log()
                time.sleep(0.02)
        finally:
            run.end()

    def wait(self, run: Run, since: float) -> bool:
        """Until a moment of some kind in what has begun since then; False where the run ends before."""
        moment, deadline = self.drawn(MOMENTS), time.monotonic() + SILENCE_S
        if moment == "start-up":
            until = time.monotonic() + self.chance.uniform(0.0, self.startup_s)
            while time.monotonic() < until and not run.over():
                time.sleep(0.005)
            return not run.over()
        most, rest_s = {"step": (12, 0.02), "save": (12, 0.02), "evaluation": (2, 0.02), "shutdown": (1, 0.2)}[moment]
        count = self.chance.randint(1, most)
        while not run.over():
            assert time.monotonic() < deadline, run.log()
            if any(each.kinds.count(moment) >= count for each in all_of(run.notes, since)):
                time.sleep(self.chance.uniform(0.0, rest_s))
                return not run.over()
            time.sleep(0.005)
        return False

    def strike(self, run: Run) -> tuple[str, str] | None:
        """Kill somebody; what was hit, and what the run was about at that moment."""
        what = self.drawn(run.kinds)
        ranks = [pid for pid in run.ranks() if alive(pid)]
        before = {each.pid: each for each in all_of(run.notes)}
        victim = self.chance.choice(ranks) if ranks else 0
        if what == "rank" and ranks:
            return ("rank", about(before.get(victim))) if killed(victim) else None
        others = [each for each in run.kinds if each != "rank"]
        what = what if what != "rank" else self.chance.choice(others)  # no rank runs yet, or the launcher is the rank
        seen = before.get(victim) or next((each for each in before.values() if alive(each.pid)), None)
        return (what, about(seen)) if run.kill(what, self.chance) else None

    def summary(self) -> str:
        """For people."""
        kinds = Counter(what for what, _ in self.hit.elements())
        moments = Counter(moment for _, moment in self.hit.elements())
        return f"{self.kills} kills, of {dict(kinds)}, during {dict(moments)}"


def about(process: Process | None) -> str:
    """What a killed process was about, by its last note."""
    if process is None:
        return "start-up"
    return (read(process.path).kinds or ["start-up"])[-1]


def startup_of(command_at: float, notes: Path) -> float:
    """Seconds from a command to the end of its first step."""
    first = min(all_of(notes), key=lambda each: each.began)
    return max(0.5, first.began - command_at + 1.0)


def weights_apart(ours: Path, theirs: Path, step: int) -> float:
    """The largest difference of a weight after a step, as a share of the largest weight of all."""
    one, other = (Checkpoint.open(str(out)) for out in (ours, theirs))
    assert one.manifest.step == other.manifest.step == step
    worst = largest = 0.0
    keys = [key for key in other.manifest.tensors if key.startswith(WEIGHTS)]
    assert keys == [key for key in one.manifest.tensors if key.startswith(WEIGHTS)] and keys
    for key in keys:
        shape = other.manifest.tensors[key].shape
        a, b = (each.read_key(key, (0,) * len(shape), shape).double() for each in (one, other))
        worst, largest = max(worst, (a - b).abs().max().item()), max(largest, b.abs().max().item())
    return worst / largest
