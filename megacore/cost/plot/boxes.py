"""What there is to draw of a timeline: a box per computation, two halves per pair, marks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.cost.plot.colours import HUES, MARKS
from megacore.cost.timeline import Timeline
from megacore.schedule.instruction import Op
from megacore.schedule.schedule import Schedule

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Boxes:
    """Columns [n]. ``top`` and ``bottom`` say which part of the rank's row a box fills, 0 being the row's top."""

    rank: Ints
    op: Ints
    chunk: Ints
    microbatch: Ints
    start: Floats
    end: Floats
    top: Floats
    bottom: Floats

    def where(self, chosen: NDArray[np.bool_]) -> "Boxes":
        """The boxes chosen."""
        return Boxes(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.rank)

    @property
    def long(self) -> Floats:
        """[n] Durations."""
        return self.end - self.start


def boxes_of(timeline: Timeline) -> Boxes:
    """All computing, rank by rank and in the order of the lists; a pair gives its forward, above, then its backward.

    Times count from the first computation's start.
    """
    return _gather(timeline, tuple(HUES))


def marks_of(timeline: Timeline) -> Boxes:
    """Reductions, sums of tied gradients and optimizer steps, with times as ``boxes_of`` has them."""
    return _gather(timeline, tuple(MARKS))


def num_chunks(schedule: Schedule) -> int:
    """Chunks of the rank that has most."""
    return max(np.unique(schedule.home, return_counts=True)[1].tolist(), default=1)


def shares(boxes: Boxes, edges: Floats) -> Floats:
    """[len(edges) - 1] Of the time between two edges, how much the boxes fill; all are of one rank, none overlap."""
    if not len(boxes):
        return np.zeros(len(edges) - 1)
    order = np.argsort(boxes.start, kind="stable")
    start, long = boxes.start[order], boxes.long[order]
    worked = np.concatenate([[0.0], np.cumsum(long * (boxes.bottom - boxes.top)[order])])
    # Time worked grows along a box and stands still behind it: a line through both ends of each.
    times = np.stack([start, start + long], axis=1).ravel()
    values = np.stack([worked[:-1], worked[1:]], axis=1).ravel()
    filled: Floats = np.diff(np.interp(edges, times, values)) / np.diff(edges)
    return filled


def _gather(timeline: Timeline, ops: Sequence[Op]) -> Boxes:
    chunk_of = _chunk_of_stage(timeline.schedule)
    zero = _first_start(timeline)
    parts: list[list[NDArray[Any]]] = [[] for _ in fields(Boxes)]
    for rank, (rows, start, end) in enumerate(zip(timeline.schedule.ranks, timeline.start, timeline.end, strict=True)):
        pair = rows.op == Op.PAIR
        both = 1 + (pair if Op.FORWARD in ops else 0)
        place = np.repeat(np.arange(len(rows)), both)  # where each row of the list is drawn: a pair twice
        behind = np.zeros(len(place), bool)
        behind[1:] = place[1:] == place[:-1]
        pair = pair[place]
        op = np.where(pair, np.where(behind, Op.BACKWARD, Op.FORWARD), rows.op[place])
        stage = np.where(behind, rows.back_stage[place], rows.stage[place])
        microbatch = np.where(behind, rows.back_microbatch[place], rows.microbatch[place])
        columns = (
            np.full(len(place), rank), op, chunk_of[stage], microbatch, start[place] - zero, end[place] - zero,
            np.where(behind, 0.5, 0.0), np.where(pair & ~behind, 0.5, 1.0),
        )  # fmt: skip
        kept = np.isin(op, ops)
        for part, column in zip(parts, columns, strict=True):
            part.append(column[kept])
    return Boxes(*map(np.concatenate, parts))


def _chunk_of_stage(schedule: Schedule) -> Ints:
    """[stages + 1] The chunk that a stage is on its rank; the last entry serves what has no stage."""
    chunk_of, met = [], [0] * schedule.num_ranks
    for rank in schedule.home:
        chunk_of.append(met[rank])
        met[rank] += 1
    return np.array([*chunk_of, 0])


def _first_start(timeline: Timeline) -> float:
    chosen = [start[timeline.computing(rank)] for rank, start in enumerate(timeline.start)]
    return min((float(each.min()) for each in chosen if len(each)), default=0.0)
