"""Timelines as files: traces in Chrome's JSON format, for Perfetto (ui.perfetto.dev) or chrome://tracing.

Beside the events that those draw, a file holds the instructions and their times as they are, under the key
"megacore", which viewers ignore: so a timeline is read back exactly.

Format: "Trace Event Format", Google, 2016. Times there are microseconds; here one unit of a timeline (a second, where
measured) is a second.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from megacore.cost.dependencies import dependencies
from megacore.cost.timeline import Timeline, Times
from megacore.schedule.instruction import Op
from megacore.schedule.rows import Bools, Rows
from megacore.schedule.schedule import Instructions, Schedule
from megacore.schedule.words import words

NANOSECONDS = 1e9
MEASURED, PREDICTED = "measured", "predicted"

# The colours that chrome://tracing has names for, near those of our pictures. Perfetto chooses by the name without its
# numbers: again one colour for each op.
COLOURS: Mapping[Op, str] = MappingProxyType(
    {
        Op.FORWARD: "thread_state_iowait",
        Op.BACKWARD: "terrible",
        Op.INPUT_GRAD: "bad",
        Op.WEIGHT_GRAD: "vsync_highlight_color",
        Op.PAIR: "rail_animation",
        Op.REDUCE: "good",
        Op.TIED: "grey",
        Op.OPTIMIZE: "black",
    }
)
_LOOKS = MappingProxyType({int(op): f'"cat":"{op.name.lower()}","cname":"{COLOURS[op]}"' for op in COLOURS})


def write_timeline(path: Path, timeline: Timeline) -> None:
    """Writes a measured timeline (seconds), for viewers and for ``read_timeline``."""
    write_trace(path, measured=timeline)


def write_trace(path: Path, predicted: Timeline | None = None, measured: Timeline | None = None) -> None:
    """Writes one timeline or both: a process each, a thread for each rank, an arrow for each message."""
    given = {name: each for name, each in ((PREDICTED, predicted), (MEASURED, measured)) if each is not None}
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms",\n"traceEvents": [\n')
        lines = (line for process, (name, each) in enumerate(given.items()) for line in _events(each, process, name))
        file.writelines(",\n" * bool(place) + line for place, line in enumerate(lines))
        kept = {name: _as_json(each) for name, each in given.items()}
        file.write(f'\n],\n"megacore": {json.dumps(kept)}\n}}\n')


def read_timeline(path: Path, name: str = MEASURED) -> Timeline:
    """What was written as ``name`` ("measured" or "predicted"), exactly. Raises ValueError for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["megacore"][name]
        lists = tuple(Instructions.parse(" ".join(rank["instructions"])) for rank in found["ranks"])
        start, end = (tuple(np.array(r[key], dtype=np.float64) for r in found["ranks"]) for key in ("start", "end"))
        schedule = Schedule(str(found["kind"]), int(found["num_microbatches"]), lists)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give the timeline.json of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no {name} timeline ({type(error).__name__}: {error}); give the timeline.json of a run"
        ) from None
    if not all(s.shape == e.shape == (len(rank),) for s, e, rank in zip(start, end, lists)):
        raise ValueError(f"{path} holds another number of times than of instructions; give the timeline.json of a run")
    return Timeline(schedule, start, end)


def _as_json(timeline: Timeline) -> dict[str, Any]:
    schedule = timeline.schedule
    ranks = [
        {"instructions": words(rank), "start": start.tolist(), "end": end.tolist()}
        for rank, start, end in zip(schedule.ranks, timeline.start, timeline.end)
    ]
    return {"kind": schedule.kind, "num_microbatches": schedule.num_microbatches, "ranks": ranks}


def _events(timeline: Timeline, process: int, name: str) -> Iterator[str]:
    """The events of one timeline, a line of JSON each, from time 0 on."""
    rows = Rows(timeline.schedule)
    drawn = np.zeros(len(rows.op), dtype=bool)
    drawn[rows.having(*COLOURS)] = True
    start, end = np.concatenate(timeline.start), np.concatenate(timeline.end)
    zero = start[drawn].min(initial=np.inf)
    # Whole nanoseconds, the finest that viewers know, so that no box ends after the next one's start.
    start, end = (np.rint((times - (zero if drawn.any() else 0.0)) * NANOSECONDS) for times in (start, end))

    def meta(kind: str, thread: int, **said: object) -> str:
        return json.dumps({"ph": "M", "name": kind, "pid": process, "tid": thread, "args": said})

    yield meta("process_name", 0, name=f"{name}: {timeline.schedule.kind}")
    yield meta("process_sort_index", 0, sort_index=process)
    for rank, instructions in enumerate(timeline.schedule.ranks):
        yield meta("thread_name", rank, name=f"rank {rank}")
        yield meta("thread_sort_index", rank, sort_index=rank)
        mine = slice(rows.begin[rank], rows.begin[rank + 1])
        boxes = drawn[mine]
        spelt = words(Instructions(instructions.table[boxes]))
        times = start[mine][boxes] / 1000, (end - start)[mine][boxes] / 1000
        looks = map(_LOOKS.__getitem__, instructions.op[boxes].tolist())
        for word, look, ts, dur in zip(spelt, looks, *(each.tolist() for each in times)):
            yield f'{{"ph":"X","name":"{word}",{look},"pid":{process},"tid":{rank},"ts":{ts},"dur":{dur}}}'
    yield from _arrows(rows, drawn, start, end, process)


def _arrows(rows: Rows, drawn: Bools, start: Times, end: Times, process: int) -> Iterator[str]:
    """From what makes a message to what needs it: from a tenth before the end of the one box to a tenth after the start
    of the other, for viewers hang an arrow on the box around its time."""
    edges = dependencies(rows)
    made, needed = edges.needs[edges.message], edges.row[edges.message]
    made = np.maximum.accumulate(np.where(drawn, np.arange(len(drawn)), 0))[made]  # of a send: the box before it
    leaves, arrives = end[made] - (end - start)[made] / 10, start[needed] + (end - start)[needed] / 10
    columns = rows.rank[made], np.rint(leaves) / 1000, rows.rank[needed], np.rint(arrives) / 1000
    both = f'"name":"message","cat":"message","pid":{process}'
    for arrow, (source, ts, target, to) in enumerate(zip(*(each.tolist() for each in columns))):
        both_ends = f'{both},"id":"{process}.{arrow}"'
        yield f'{{"ph":"s",{both_ends},"tid":{source},"ts":{ts}}}'
        yield f'{{"ph":"f","bp":"e",{both_ends},"tid":{target},"ts":{to}}}'
