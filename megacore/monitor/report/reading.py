"""A run's folder, read for its report: whatever is there, of runs that go on, were killed, or left odd files behind.

Nothing of it is believed: numbers are checked to be numbers, lines that are none of ours are counted and left out.
"""

import json
import math
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.cost.memory import RankMemory, memory_by_rank
from megacore.layout.layout import Layout
from megacore.monitor.goodput import Goodput, goodput
from megacore.monitor.run_folder import CONFIG, EVENTS, LOG, METRICS, TIMELINE_PICTURE

Record = dict[str, Any]
ALIVE_S = 120.0
"""A run that has written nothing for so long, and for ten of its steps, is taken to have ended without a word."""
LOG_BYTES = 64_000
LARGEST_PICTURE = 8_000_000
LONGEST_S, LATEST_S = 1e9, 1e11
LAST_STEP, LARGEST = 1 << 53, 1e100
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Run:
    """What a folder says. ``config`` is None where this version cannot read config.toml, for ``config_problem``."""

    folder: Path
    metrics: tuple[Record, ...]
    events: tuple[Record, ...]
    damaged: tuple[str, ...]
    config_text: str
    config: RunConfig | None
    config_problem: str
    log: str
    timeline: bytes
    goodput: Goodput | None
    status: str
    age_s: float
    """Since something was written last."""

    def named(self, *names: str) -> list[Record]:
        """Events of these names."""
        return [event for event in self.events if event["event"] in names]

    @property
    def start(self) -> Record:
        """The newest start."""
        return (self.named("start") or [{}])[-1]

    @property
    def last(self) -> Record:
        """The newest record of a step."""
        return self.metrics[-1] if self.metrics else {}

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) wherever it is finite; ``name`` is dotted where it lies deeper."""
        *outer, last = name.split(".")
        points = []
        for each in self.metrics:  # of which there may be hundreds of thousands
            found: Any = each
            for part in outer:
                found = found.get(part) if type(found) is dict else None
            value = found.get(last) if type(found) is dict else None
            if value is not None and (known := number(value)) is not None:
                points.append((float(each["step"]), known))
        return points

    def memory(self) -> tuple[RankMemory, ...]:
        """What each pipeline rank should need, by the planner; empty where the configuration cannot be priced."""
        world = self.start.get("world_size")
        if self.config is None or not isinstance(world, int):
            return ()
        try:
            config = resolve(self.config, world)
            return memory_by_rank(config, Layout.of(config.parallel, world))
        except (ValueError, ArithmeticError):
            return ()


def read_run(folder: Path, now: float | None = None) -> Run:
    """Raises ValueError where there is no run."""
    if not folder.is_dir() or not any((folder / name).exists() for name in (METRICS, EVENTS, CONFIG)):
        what = f"it has no {METRICS}, {EVENTS} or {CONFIG}" if folder.is_dir() else "it is not there"
        raise ValueError(f"{folder} is no folder of a run: {what}; give a run's `out`")
    damaged: list[str] = []
    metrics = _lines(folder / METRICS, lambda each: is_step(each.get("step")), damaged)
    by_step = {each["step"]: each for each in metrics}
    metrics = [by_step[step] for step in sorted(by_step)]
    events = _lines(
        folder / EVENTS,
        lambda each: isinstance(each.get("event"), str) and 0 < (number(each.get("time")) or 0.0) < LATEST_S,
        damaged,
    )
    text = _text(folder / CONFIG)
    config, problem = _config(folder / CONFIG, text)
    now = time.time() if now is None else now
    written = [(folder / name).stat().st_mtime for name in (METRICS, EVENTS, LOG, CONFIG) if (folder / name).exists()]
    age = max(0.0, now - max(written))
    status = status_of(events, metrics, age)
    found = _goodput(events, metrics, now if status == "running" else now - age)
    picture = folder / TIMELINE_PICTURE
    timeline = picture.read_bytes() if picture.is_file() and picture.stat().st_size <= LARGEST_PICTURE else b""
    log = _text(folder / LOG, LOG_BYTES)
    return Run(
        folder, tuple(metrics), tuple(events), tuple(damaged), text, config, problem, log, timeline, found, status, age
    )


def status_of(events: Sequence[Record], metrics: Sequence[Record], age_s: float) -> str:
    """finished, stopped, failed, running, or lost: ended without a word."""
    ends = {"finish": "finished", "stop": "stopped", "fault": "failed"}
    for event in reversed(events):
        if event["event"] in ends:
            return ends[event["event"]]
        if event["event"] == "start":
            break
    step_s = number(metrics[-1].get("step_time_s")) if metrics else None
    return "running" if age_s < max(ALIVE_S, 10 * (step_s or 0.0)) else "lost"


def places(run: Run) -> list[tuple[Record, int | None]]:
    """Every event with the step that it belongs to: its own, or as far as the run had come."""
    found: list[tuple[Record, int | None]] = []
    ends: int | None = run.last.get("step")
    for event in reversed(run.events):
        own = next((event[name] for name in ("step", "first_step") if is_step(event.get(name))), None)
        if event["event"] == "resume" and is_step(event.get("again_until_step")):
            ends = event["again_until_step"]
        elif own is not None and event["event"] != "start":
            ends = own
        found.append((event, ends if own is None else own))
    return found[::-1]


def checkpoints(run: Run) -> list[Record]:
    """Saved steps: step, bytes, seconds, time, folder and whether it is still there, newest first."""
    removed = {Path(str(each)).name for event in run.named("save") for each in _list(event.get("removed"))}
    known: dict[int, Record] = {}
    for event in run.named("save"):
        if is_step(event.get("step")):
            known[event["step"]] = {**event, "kept": Path(str(event.get("checkpoint", ""))).name not in removed}
    for folder in sorted((run.folder / CHECKPOINTS).glob("step-*")) if (run.folder / CHECKPOINTS).is_dir() else ():
        digits = folder.name.removeprefix("step-")
        if digits.isdigit() and int(digits) not in known:
            known[int(digits)] = {"step": int(digits), "checkpoint": str(folder), "kept": True}
    for step, each in known.items():
        local = run.folder / CHECKPOINTS / f"step-{step:08d}"
        if (run.folder / CHECKPOINTS).is_dir():
            each["kept"] = local.is_dir()
    return [known[step] for step in sorted(known, reverse=True)]


def is_step(value: Any) -> bool:
    """Whether it can be the number of a step."""
    return type(value) is int and 0 <= value < LAST_STEP


def number(value: Any) -> float | None:
    """A finite number, not beyond all measure, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < LARGEST else None


def _lines(path: Path, fits: Any, damaged: list[str]) -> list[Record]:
    if not path.exists():
        return []
    found, bad = [], 0
    lines = path.read_bytes().split(b"\n")
    for place, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            each = json.loads(line)
            good = isinstance(each, dict) and fits(each)
        except (ValueError, RecursionError):
            good = False
        if good:
            found.append(each)
        elif place < len(lines) - 1:  # the last one may be in the middle of being written
            bad += 1
    if bad:
        damaged.append(f"{bad} of {len(lines)} lines of {path.name} cannot be read and are left out")
    return found


def _text(path: Path, last_bytes: int | None = None) -> str:
    if not path.is_file():
        return ""
    content = path.read_bytes()
    if last_bytes is not None and len(content) > last_bytes:
        content = content[-last_bytes:].partition(b"\n")[2]
    return content.decode("utf-8", "replace")


def _config(path: Path, text: str) -> tuple[RunConfig | None, str]:
    if not text:
        return None, f"there is no {CONFIG}"
    try:
        tomllib.loads(text)
        return load(str(path)), ""
    except ValueError as error:  # written by another version, or damaged
        return None, str(error)


def _goodput(events: Sequence[Record], metrics: Sequence[Record], now: float) -> Goodput | None:
    """Of what is plainly a time."""
    starts = []
    for event in events:
        phases = event.get("startup_s")
        known = phases.values() if event["event"] == "start" and isinstance(phases, dict) else ()
        starts.append({**event, "startup_s": dict(enumerate(map(_seconds, known)))})
    steps = [{"step": each["step"], "step_time_s": _seconds(each.get("step_time_s"))} for each in metrics]
    latest = max((event["time"] for event in events), default=now)  # of a machine whose clock is ahead
    return goodput(starts, steps, max(now, latest))


def _seconds(value: Any) -> float:
    found = number(value)
    return found if found is not None and 0 <= found < LONGEST_S else 0.0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def thinned(points: Sequence[tuple[float, float]], most: int) -> Iterator[tuple[float, float]]:
    """At most about ``most`` points that look the same: of each stretch the least and the greatest."""
    if len(points) <= most:
        yield from points
        return
    stretch = math.ceil(2 * len(points) / most)
    for first in range(0, len(points), stretch):
        part = points[first : first + stretch]
        low = min(range(len(part)), key=lambda place: part[place][1])
        high = max(range(len(part)), key=lambda place: part[place][1])
        for place in sorted({low, high}):
            yield part[place]
