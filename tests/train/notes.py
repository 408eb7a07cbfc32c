"""What ranks really did, read from the notes that `recording/sitecustomize.py` makes in their processes."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS, METRICS

RECORDING = Path(__file__).parent / "recording"
MICROBATCH = tuple[tuple[int, ...], str]
"""Ordinals, and the hash of the tokens."""
IN_FLIGHT = 2
"""Steps that a killed run may have begun and not written down: one is computed, one is read while the next runs."""


def environment(notes: Path, **of: str) -> dict[str, str]:
    """The environment ``of`` processes, or this one's, in which they make notes."""
    notes.mkdir(parents=True, exist_ok=True)
    noting = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECORDING), "MEGACORE_NOTES": str(notes)}
    return (of or dict(os.environ)) | noting


@dataclass
class Process:
    """What one rank's process has noted so far."""

    path: Path
    began: float
    pid: int
    rank: int = 0
    world: int = 0
    life: str = ""
    kinds: list[str] = field(default_factory=list)
    """In order: start-up, step, evaluation, save, shutdown."""
    steps: dict[int, tuple[MICROBATCH, ...]] = field(default_factory=dict)


def read(path: Path) -> Process:
    """One process' notes."""
    nanoseconds, pid = path.name.split("-")
    process = Process(path, int(nanoseconds) / 1e9, int(pid))
    for line in path.read_bytes().split(b"\n")[:-1]:
        _, kind, *details = json.loads(line)
        if kind == "train":
            process.rank, process.world = details
        elif kind == "life":
            (process.life,) = details
        elif kind == "step":
            process.steps[details[0]] = tuple((tuple(ordinals), found) for ordinals, found in details[1:])
        process.kinds.append(phase(kind, details, bool(process.steps), process.kinds))
    return process


def phase(kind: str, details: list[Any], trains: bool, before: list[str]) -> str:
    """What a run is about, in a word."""
    if kind == "left" or "shutdown" in before:
        return "save" if kind == "save" else "shutdown"
    if not trains:
        return "start-up"
    if kind == "does":
        return {"evaluation": "evaluation", "saving": "save", "the end": "shutdown"}[details[0]]
    return kind


def all_of(notes: Path, since: float = 0.0) -> list[Process]:
    """Those that began to train after a moment, in the order in which they did."""
    found = (path for path in notes.iterdir() if int(path.name.split("-")[0]) / 1e9 > since)
    return [read(path) for path in sorted(found, key=lambda path: int(path.name.split("-")[0]))]


def order_of(notes: Path, steps: int, batch: int) -> dict[int, tuple[MICROBATCH, ...]]:
    """The microbatches of each step of an uninterrupted run, put together from all its ranks."""
    whole: dict[int, tuple[MICROBATCH, ...]] = {}
    processes = all_of(notes)
    assert len({each.life for each in processes}) == 1
    for step in range(1, steps + 1):
        dealt = {each.steps[step] for each in processes}
        whole[step] = tuple(sorted(microbatch for hand in dealt for microbatch in hand))
        ordinals = [ordinal for microbatch, _ in whole[step] for ordinal in microbatch]
        assert ordinals == list(range(batch * (step - 1), batch * step)), "the next samples, each once"
    assert len({found for batches in whole.values() for _, found in batches}) > steps, "the samples differ"
    return whole


def same_order(notes: Path, order: Mapping[int, tuple[MICROBATCH, ...]]) -> int:
    """Check that every start of a run gave its ranks, step by step, the samples of the uninterrupted one, and that each
    step was made whole by the last start that made it. Returns how often a step was begun again."""
    hands: dict[tuple[int, str], list[tuple[int, tuple[MICROBATCH, ...]]]] = defaultdict(list)
    last: dict[int, tuple[float, str, int]] = {}
    for process in all_of(notes):
        for step, hand in process.steps.items():
            hands[step, process.life].append((process.rank, hand))
            last[step] = max(last.get(step, (0.0, "", 0)), (process.began, process.life, process.world))
    for (step, life), given in hands.items():
        distinct = {hand for _, hand in given}
        dealt = [microbatch for hand in distinct for microbatch in hand]
        assert set(dealt) <= set(order[step]), f"step {step} has samples of its own"
        assert len(dealt) == len(set(dealt)), f"step {step} was given a sample twice"
        assert all(list(hand) == sorted(hand) for hand in distinct), f"step {step}: another order"
        if life == last[step][1]:
            assert sorted(dealt) == sorted(order[step]), f"step {step} lacks samples"
            copies = Counter(hand for _, hand in given)
            assert sorted(rank for rank, _ in given) == list(range(last[step][2])), f"step {step} lacks ranks"
            assert len(set(copies.values())) == 1, f"step {step}: shares differ"
    assert sorted(last) == sorted(order)
    return len(hands) - len(order)


def accounted(out: Path, notes: Path, steps: int, batch: int) -> int:
    """Check that events.jsonl tells what became of each sample, and that this is what the ranks did; returns how many
    samples, by what it tells, were trained on again.

    A run that dies before its first checkpoint begins anew, and its files are put aside: they are read, too.
    """
    folders = sorted((out / "previous").glob("*"), key=lambda each: int(each.name)) if out.exists() else []
    told: list[dict[str, Any]] = []
    for folder in (*folders, out):
        if (folder / EVENTS).exists():
            told += read_json_lines(folder / EVENTS)
    starts = [event for event in told if event["event"] == "start"]
    lives = [process for process in all_of(notes) if process.rank == 0]
    for start, after in zip(starts, (*starts[1:], None), strict=True):
        assert start["samples"] == batch * (start["first_step"] - 1)
        (life,) = [each for each in lives if each.began <= start["time"]][-1:]
        assert after is None or life is not [each for each in lives if each.began <= after["time"]][-1]
        assert not life.steps or min(life.steps) == start["first_step"]
    assert sum(1 for life in lives if life.steps) <= len(starts), "each that trained has said so"
    again, reached = 0, 0.0
    for resume in (event for event in told if event["event"] == "resume"):
        *before, mine = (each for each in lives if each.began <= resume["time"])
        done = max((max(each.steps) for each in before if each.steps), default=0)
        undeclared = max((max(each.steps) for each in before if each.steps and each.began >= reached), default=0)
        until, reached = resume["again_until_step"], mine.began
        assert resume["step"] <= until <= max(done, resume["step"]), "what nobody did is not done again"
        assert undeclared - until <= IN_FLIGHT, f"steps {until + 1} to {undeclared} were trained on unaccounted for"
        assert (resume["samples"], resume["again_until_sample"]) == (batch * resume["step"], batch * until)
        again += resume["again_until_sample"] - resume["samples"]
    saved = {event["step"]: event["samples"] for event in told if event["event"] == "save"}
    assert all(samples == batch * step for step, samples in saved.items())
    assert told[-1]["event"] == "finish" and told[-1]["samples"] == batch * steps
    assert [each["step"] for each in read_json_lines(out / METRICS)] == list(range(1, steps + 1))
    return again
