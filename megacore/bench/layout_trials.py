"""`megacore bench layouts`, first part: which layouts are tried, and how one of them is run as a command of its own.

Every trial is `megacore train` in fresh processes, for a few steps and with a time limit: nothing of one layout is left
when the next begins, and whatever kills a layout kills nothing else.
"""

import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megacore.config.errors import ConfigError
from megacore.config.schema import CheckpointConfig, LogConfig, ParallelConfig, RunConfig
from megacore.config.write import config_hash, to_toml
from megacore.exits import STOPPED
from megacore.monitor.run_folder import METRICS
from megacore.verify.covering import covering, legal_layouts, sizes_of
from megacore.verify.layouts import ONE, filled_in, label_of, num_ranks, read_layouts, text_of, why_illegal

WARMUP = 2
"""Steps that are not counted: memory is touched for the first time, and connections are made."""

OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemoryError|MemoryError|can't allocate memory|SIGKILL", re.IGNORECASE)
CHOICES = ("sizes", "pairs", "all")
KILL_S = 5.0
"""From asking processes to end until they are ended."""

Runner = Callable[["Trial", int], "Record"]
"""(trial, round): runs it."""


@dataclass(frozen=True)
class Trial:
    """One layout: its words for ``--layouts``, a name for people, and the run in it."""

    text: str
    label: str
    config: RunConfig

    @property
    def num_ranks(self) -> int:
        """Processes."""
        return num_ranks(self.config.parallel)


@dataclass(frozen=True)
class Record:
    """What came of one trial in one round: a line of layouts.jsonl.

    ``status`` is ok, oom, timeout, refused (the run's own checks) or failed; ``reason`` says why. ``seconds`` are those
    of the steps behind the warm-up, as the run's metrics have them; ``wall_s`` is the command's whole time.
    """

    layout: str
    round: int
    status: str
    reason: str = ""
    seconds: tuple[float, ...] = ()
    memory_gb: float | None = None
    wall_s: float = 0.0

    @property
    def median(self) -> float | None:
        """Seconds of a step."""
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class How:
    """How trials are run: ``steps`` counted steps, at most ``limit_s`` each, in ``folder``.

    ``launcher`` are the words that start `megacore` on {nproc} ranks (srun, torchrun); empty: this Python starts local
    processes.
    """

    folder: Path
    steps: int
    limit_s: float
    launcher: str = ""

    def command(self, trial: Trial, run_file: Path) -> list[str]:
        """The words of the command line."""
        if not self.launcher:
            return [sys.executable, "-m", "megacore", "train", str(run_file), "--nproc", str(trial.num_ranks)]
        return [*shlex.split(self.launcher.replace("{nproc}", str(trial.num_ranks))), "train", str(run_file)]


def trials_of(run: RunConfig, named: str | None, choose: str, max_ranks: int) -> list[Trial]:
    """The layouts to try, fewest ranks first.

    ``named`` is what ``--layouts`` says; None: of all legal ones of at most ``max_ranks`` ranks those with other sizes
    (``choose`` sizes), as many as have every pair of values (pairs), or all. Raises ConfigError with everything that is
    wrong.
    """
    problems: list[str] = []
    if named is not None:
        read = read_layouts(named, run.parallel, problems)
        problems += [f"layout {name}: {line}" for name, one in read.items() for line in why_illegal(run, one)]
        layouts = list(read.values())
    else:
        layouts = _chosen(run, choose, max_ranks)
        if not layouts:
            problems += why_illegal(run, ONE) or [f"the run has no legal layout of up to --max-ranks={max_ranks}"]
    if problems:
        raise ConfigError(problems)
    unique = {text_of(layout): layout for layout in layouts}
    trials = [Trial(text, described(layout), replace(run, parallel=layout)) for text, layout in unique.items()]
    return sorted(trials, key=lambda trial: trial.num_ranks)


def described(layout: ParallelConfig) -> str:
    """A layout in few words, its schedule among them."""
    words = [label_of(layout)]
    if layout.pp > 1 and layout.schedule != ONE.schedule:
        words.append(layout.schedule)
    return " ".join([*words, *[f"recompute {layout.recompute}"] * (layout.recompute != "none")])


def _chosen(run: RunConfig, choose: str, max_ranks: int) -> list[ParallelConfig]:
    one = [] if why_illegal(run, ONE) else [ONE]
    if choose == "sizes":
        sizes = [filled_in({"tp": s.tp, "pp": s.pp, "dp": s.dp}, run.parallel) for s in sizes_of(run, max_ranks)]
        return [*one, *(layout for layout in sizes if not why_illegal(run, layout))]
    legal = legal_layouts(run, max_ranks)
    return [*one, *(covering(legal) if choose == "pairs" else legal)]


def as_timed(run: RunConfig, steps: int) -> RunConfig:
    """The run as far as steps are timed: nothing is saved, evaluated or shown on the way."""
    train = replace(run.train, steps=WARMUP + steps, eval_every=0, batch_ramp=())
    checkpoint = replace(CheckpointConfig(), resume="never", init_from=run.checkpoint.init_from)
    return replace(run, train=train, checkpoint=checkpoint, log=LogConfig())


def key_of(run: RunConfig) -> str:
    """What results must have in common to be compared: the run without its layout and folder."""
    return config_hash(replace(run, parallel=ParallelConfig(), out=""))


def run_trial(how: How, trial: Trial, number: int) -> Record:
    """One trial in one round."""
    out = how.folder / "runs" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', trial.text.replace('=', ''))}.{number}"
    out.mkdir(parents=True, exist_ok=True)
    (out / METRICS).unlink(missing_ok=True)
    run_file = out / "run.toml"
    run_file.write_text(to_toml(replace(trial.config, out=str(out))))
    started = time.monotonic()
    with (out / "console.txt").open("w") as console:
        process = subprocess.Popen(
            how.command(trial, run_file), stdout=console, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(how.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    wall = time.monotonic() - started
    said = (out / "console.txt").read_text(errors="replace")
    if code == 0:
        return _timed(out / METRICS, trial, number, wall)
    status, reason = why(code, said, how.limit_s)
    return Record(trial.text, number, status, reason, wall_s=wall)


def why(code: int | None, said: str, limit_s: float) -> tuple[str, str]:
    """(status, reason) of a command that ended with ``code`` (None: it was ended at the limit) and ``said`` so much."""
    lines = [line.strip(" │╭╮╰╯─") for line in said.splitlines() if line.strip(" │╭╮╰╯─")]
    if code is None:
        return "timeout", f"not done after {limit_s:g} s"
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or OUT_OF_MEMORY.search(said):
        told = next((line for line in lines if OUT_OF_MEMORY.search(line)), "killed, as the kernel does without memory")
        return "oom", told
    if code == STOPPED:
        return "failed", "it was told to stop"
    last = lines[-1] if lines else "it said nothing"
    ours = next((line for line in lines if line.startswith("megacore: ")), "")
    return ("refused", ours or last) if code == 2 else ("failed", ours or f"exit code {code}: {last}")


def _timed(path: Path, trial: Trial, number: int, wall: float) -> Record:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line for line in lines if line["step"] > WARMUP and line.get("step_time_s") is not None]
    if not steps:
        return Record(trial.text, number, "failed", f"no steps in {path.name}", wall_s=wall)
    memory = [line["memory_gb"] for line in steps if line.get("memory_gb") is not None]
    seconds = tuple(line["step_time_s"] for line in steps)
    return Record(trial.text, number, "ok", "", seconds, max(memory, default=None), wall)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a trial is left: its processes are one session."""
    for number, patience in ((signal.SIGTERM, KILL_S), (signal.SIGKILL, KILL_S)):
        if process.poll() is None:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue


class Results:
    """layouts.jsonl: what is known, so that a sweep goes on where it was interrupted. The first line says of what."""

    def __init__(self, path: Path, key: str, about: dict[str, Any]) -> None:
        """Raises ValueError if the file holds the results of another run."""
        self.path, self.records = path, {}  # type: Path, dict[tuple[str, int], Record]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"key": key, **about})
            return
        text = path.read_text()
        if not text.endswith("\n"):  # it was interrupted while the last line was written
            with path.open("a") as file:
                file.write("\n")
        lines = text.splitlines()
        if not lines or json.loads(lines[0]).get("key") != key:
            raise ValueError(
                f"{path} holds the results of another run, or of other steps; give another --output, or remove the file"
            )
        for line in lines[1:]:
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            found["seconds"] = tuple(found["seconds"])
            self._keep(Record(**found))

    def add(self, record: Record) -> None:
        """Keep a record, on disk first."""
        self._append(asdict(record))
        self._keep(record)

    def _keep(self, record: Record) -> None:
        self.records[record.layout, record.round] = record

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def failed(self, layout: str) -> Record | None:
        """A layout that has once failed is not tried again."""
        return next((r for (name, _), r in self.records.items() if name == layout and r.status != "ok"), None)


def sweep(trials: Sequence[Trial], rounds: int, results: Results, run: Runner, say: Callable[[str], object]) -> None:
    """Every trial once a round, in an order that is turned each round, so that none always follows the same other.

    What is known is skipped; a layout that failed is left out of later rounds.
    """
    for number in range(rounds):
        shift = number * max(1, len(trials) // max(1, rounds)) % max(1, len(trials))
        for trial in [*trials[shift:], *trials[:shift]]:
            if (trial.text, number) in results.records or results.failed(trial.text):
                continue
            record = run(trial, number)
            results.add(record)
            told = f"{record.median:.3f} s" if record.median is not None else f"{record.status}: {record.reason}"
            say(f"round {number + 1} of {rounds}: {trial.label}: {told}\n")
