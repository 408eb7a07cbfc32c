"""Traces are what viewers read, and give back the timelines that they hold."""

import json
from pathlib import Path

import numpy as np
import pytest

from megacore.cost.simulate import Durations, simulate
from megacore.cost.timeline import Timeline
from megacore.cost.trace import COLOURS, read_timeline, write_timeline, write_trace
from megacore.schedule.generators.generate import KINDS, generate
from megacore.schedule.lower import lower
from megacore.schedule.schedule import Instructions, Schedule
from megacore.schedule.words import words

DURATIONS = Durations(1 / 3, 0.7, 0.37, 0.33, 0.01, 0.9, 0.1, 0.2, 0.3)


def timeline(kind: str = "1f1b", num_ranks: int = 3, num_microbatches: int = 5) -> Timeline:
    """With an awkward beginning, as clocks have."""
    found = simulate(lower(generate(kind, num_ranks, num_microbatches), tied=True), DURATIONS)
    return Timeline(found.schedule, *(tuple(1e5 / 3 + each for each in times) for times in (found.start, found.end)))


def events(path: Path) -> list[dict]:
    return json.loads(path.read_text())["traceEvents"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_exactly(kind, tmp_path):
    one, path = timeline(kind), tmp_path / "timeline.json"
    write_timeline(path, one)
    other = read_timeline(path)
    assert other.schedule == one.schedule
    for ours, theirs in zip((*one.start, *one.end), (*other.start, *other.end), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_both_are_read_back_by_name(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(path, timeline("gpipe"), timeline("zb-v"))
    assert [read_timeline(path, name).schedule.kind for name in ("predicted", "measured")] == ["gpipe", "zb-v"]
    write_trace(path, timeline("gpipe"))
    with pytest.raises(
        ValueError, match=r"trace\.json holds no measured timeline .*; give the timeline\.json of a run"
    ):
        read_timeline(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_for_whatever_takes_time(kind, tmp_path):
    one = timeline(kind)
    write_trace(tmp_path / "t.json", measured=one)
    boxes = [event for event in events(tmp_path / "t.json") if event["ph"] == "X"]
    zero = min(start.min() for start in one.start)
    expected = [
        (
            str(instruction),
            rank,
            pytest.approx((start - zero) * 1e6, abs=2e-3),
            pytest.approx((end - start) * 1e6, abs=2e-3),
        )
        for rank, instructions in enumerate(one.schedule.ranks)
        for instruction, start, end in zip(instructions, one.start[rank], one.end[rank])
        if instruction.op in COLOURS
    ]
    assert [(box["name"], box["tid"], box["ts"], box["dur"]) for box in boxes] == expected
    assert len({(box["cat"], box["cname"]) for box in boxes}) == len({box["cat"] for box in boxes})


def test_no_box_ends_after_the_next_one_starts(tmp_path):
    write_timeline(tmp_path / "t.json", timeline(num_microbatches=40))
    ends = dict.fromkeys(range(3), 0)
    for box in events(tmp_path / "t.json"):
        if box["ph"] == "X":
            start, end = round(box["ts"] * 1000), round((box["ts"] + box["dur"]) * 1000)
            assert ends[box["tid"]] <= start
            ends[box["tid"]] = end


def inside(end: dict, boxes: list[dict]) -> str:
    """The box that an arrow's end hangs on."""
    at = (box for box in boxes if box["tid"] == end["tid"] and box["ts"] < end["ts"] < box["ts"] + box["dur"])
    (found,) = at
    return found["name"]


@pytest.mark.parametrize("lowered", [False, True])
def test_an_arrow_for_each_message(lowered, tmp_path):
    lists = Schedule("two", 1, (Instructions.parse("F0.0 F2.0 B2.0 B0.0"), Instructions.parse("F1.0 B1.0")))
    write_trace(tmp_path / "t.json", simulate(lower(lists) if lowered else lists))
    found = events(tmp_path / "t.json")
    boxes = [event for event in found if event["ph"] == "X"]
    ends = {kind: {event["id"]: event for event in found if event["ph"] == kind} for kind in "sf"}
    assert {(inside(start, boxes), inside(ends["f"][key], boxes)) for key, start in ends["s"].items()} == {
        ("F0.0", "F1.0"),
        ("F1.0", "F2.0"),
        ("B2.0", "B1.0"),
        ("B1.0", "B0.0"),
    }
    assert ends["s"].keys() == ends["f"].keys()
    assert len(ends["s"]) == 4


def test_processes_and_threads_are_named(tmp_path):
    write_trace(tmp_path / "t.json", timeline("gpipe", 2), timeline("1f1b", 2))
    named = [
        (e["name"], e["pid"], e["tid"], e["args"]["name"])
        for e in events(tmp_path / "t.json")
        if "name" in e.get("args", ())
    ]
    assert named == [
        ("process_name", 0, 0, "predicted: gpipe"),
        ("thread_name", 0, 0, "rank 0"),
        ("thread_name", 0, 1, "rank 1"),
        ("process_name", 1, 0, "measured: 1f1b"),
        ("thread_name", 1, 0, "rank 0"),
        ("thread_name", 1, 1, "rank 1"),
    ]


def holding(**rank: object) -> str:
    """A file with one rank that has the given instructions, start or end."""
    ranks = [{"instructions": ["F0.0"], "start": [0.0], "end": [1.0], **rank}]
    return json.dumps({"megacore": {"measured": {"kind": "x", "num_microbatches": 1, "ranks": ranks}}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"megacore": {}}',
        '{"megacore": {"measured": 3}}',
        holding(instructions=["F0"]),
        holding(start=[]),
        holding(start=["a"]),
        holding(end=None),
    ],
)
def test_other_files_are_refused(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json holds .*; give the timeline\.json of a run"):
        read_timeline(path)
    with pytest.raises(ValueError, match=r"none\.json cannot be read: No such file"):
        read_timeline(tmp_path / "none.json")


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_the_texts(kind):
    whole = lower(generate(kind, 2, 12), tied=True)
    for rank in (*whole.ranks, Instructions.parse("G0.2 X10.3 O T0~3"), Instructions.of([])):
        assert words(rank) == list(map(str, rank))
