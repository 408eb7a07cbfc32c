"""When every instruction of a schedule would run, given how long each takes."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megacore.cost.dependencies import Edges, dependencies, messages
from megacore.cost.timeline import Timeline, Times
from megacore.schedule.instruction import COMPUTE, Op
from megacore.schedule.rows import Ints, Rows
from megacore.schedule.schedule import Schedule

TIMED = (*COMPUTE, Op.REDUCE, Op.TIED, Op.OPTIMIZE)
"""What keeps a rank busy; messages travel beside, and parameters are gathered and freed beside."""

PerStage = float | Sequence[float]
"""One number for all stages, or one for each."""


@dataclass(frozen=True)
class Durations:
    """How long instructions take, in any one unit of time. nan: not known, and refused where it is needed."""

    forward: PerStage = 1.0
    backward: PerStage = 2.0
    input_grad: PerStage = 1.0
    weight_grad: PerStage = 1.0
    p2p: float = 0.0
    """From the end of what makes a message to its arrival. It keeps no rank busy."""
    overlap: float = 1.0
    """A pair's time, as a share of its forward's and its backward's together."""
    reduce: PerStage = 0.0
    tied: float = 0.0
    optimize: float = 0.0

    @classmethod
    def measured(cls, timeline: Timeline) -> "Durations":
        """The mean of each op on each stage of a measured ``timeline``, to predict with.

        A backward that only ever ran in halves takes the time of both. ``p2p`` is what messages took once both of
        their ends were reached; of sums over tied weights and of optimizer steps the shortest counts, for the others
        waited for it. What the run never did is nan.
        """
        rows = Rows(timeline.schedule)
        start, end = np.concatenate(timeline.start), np.concatenate(timeline.end)
        num_stages = 1 + int(rows.stage.max(initial=0))
        cell = rows.op * num_stages + np.maximum(rows.stage, 0)
        total, count = (np.bincount(cell, weight, len(Op) * num_stages) for weight in (end - start, None))
        with np.errstate(invalid="ignore"):
            mean = (total / count).reshape(len(Op), num_stages)
        halves = mean[Op.INPUT_GRAD] + mean[Op.WEIGHT_GRAD]
        mean[Op.BACKWARD] = np.where(np.isnan(mean[Op.BACKWARD]), halves, mean[Op.BACKWARD])

        pair = rows.having(Op.PAIR)
        apart = mean[Op.FORWARD, rows.stage[pair]] + mean[Op.BACKWARD, rows.back_stage[pair]]
        pair, apart = pair[~np.isnan(apart)], apart[~np.isnan(apart)]
        sends, receives = messages(rows)
        took = end[receives] - np.maximum(start[sends], start[receives])
        per_stage = {name: tuple(mean[op].tolist()) for op, name in _NAMES if op in COMPUTE}
        return cls(
            **per_stage,
            p2p=_mean(np.maximum(took, 0.0)),
            overlap=float((end - start)[pair].sum() / apart.sum()) if len(pair) else 1.0,
            reduce=tuple(np.nan_to_num(mean[Op.REDUCE]).tolist()),
            tied=_least((end - start)[rows.having(Op.TIED)]),
            optimize=_least((end - start)[rows.having(Op.OPTIMIZE)]),
        )

    def of(self, rows: Rows, chosen: Ints) -> Times:
        """[chosen] Of these rows. Raises ValueError for what is not a time."""
        num_stages = 1 + max(int(column.max(initial=0)) for column in (rows.stage, rows.back_stage))
        by_stage = np.zeros((len(Op), num_stages))
        for op, name in _NAMES:
            given = np.asarray(getattr(self, name), dtype=np.float64)
            if given.ndim and len(given) != num_stages:
                raise ValueError(f"{name} has the times of {len(given)} stages, the schedule has {num_stages} stages")
            by_stage[op] = given
        op, stage = rows.op[chosen], rows.stage[chosen]
        by_stage[Op.PAIR] = self.overlap * by_stage[Op.FORWARD]
        times: Times = by_stage[op, stage]
        pair = np.flatnonzero(op == Op.PAIR)
        times[pair] += self.overlap * by_stage[Op.BACKWARD, rows.back_stage[chosen[pair]]]
        wrong = np.flatnonzero(~(np.isfinite(times) & (times >= 0)))
        if len(wrong):
            raise ValueError(f"{rows.place(chosen[wrong[0]])} takes {times[wrong[0]]}: give it a time of 0 or more")
        if not 0 <= self.p2p < math.inf:
            raise ValueError(f"p2p={self.p2p} is not a time of 0 or more")
        return times


_NAMES = (
    (Op.FORWARD, "forward"),
    (Op.BACKWARD, "backward"),
    (Op.INPUT_GRAD, "input_grad"),
    (Op.WEIGHT_GRAD, "weight_grad"),
    (Op.REDUCE, "reduce"),
    (Op.TIED, "tied"),
    (Op.OPTIMIZE, "optimize"),
)


def _mean(times: Times) -> float:
    return float(times.mean()) if len(times) else 0.0


def _least(times: Times) -> float:
    return float(times.min()) if len(times) else 0.0


def simulate(schedule: Schedule, durations: Durations = Durations()) -> Timeline:
    """Each rank runs its list in order, everything as soon as it can; the time line begins at 0.

    Messages keep no rank busy: their times run from the end of what made them to their arrival. ``reduce`` keeps its
    rank busy; ``tied`` and ``optimize`` begin when all their ranks are there. With or without messages in the lists the
    times are the same (if sends stand right behind what made them). About 1 us per computing instruction.

    Raises ValueError for lists that cannot run, naming what is blocked, and for durations that do not fit.
    """
    rows = Rows(schedule)
    timed = np.zeros(len(rows.op), dtype=bool)
    timed[rows.having(*TIMED)] = True
    count = np.append(0, np.cumsum(timed))
    first = count[rows.begin]
    # Of the timed instructions, the last one that its rank has got through where a row stands; -1: none.
    through = count[1:] - 1
    through[through < first[rows.rank]] = -1

    edges = dependencies(rows)
    waits = Edges(through[edges.row], through[edges.needs], edges.message)
    timed_rows = np.flatnonzero(timed)
    begins, ends = _run(waits, first, durations.of(rows, timed_rows), durations.p2p)
    stuck = np.flatnonzero(np.isinf(ends))
    if len(stuck):
        raise ValueError(_blocked(rows, waits, timed_rows, stuck))
    end = np.append(ends, 0.0)[through]
    start = end.copy()
    start[timed] = begins
    sends, receives = messages(rows)
    start[receives] = end[sends]
    end[receives] = end[sends] = end[sends] + durations.p2p
    cuts = rows.begin[1:-1]
    return Timeline(schedule, tuple(np.split(start, cuts)), tuple(np.split(end, cuts)))


def _run(waits: Edges, first: Ints, duration: Times, p2p: float) -> tuple[Times, Times]:
    """Start and end of each timed instruction; inf for those that are never reached.

    One that awaits several others becomes as many steps, of which the last does the work: then a step has one wait.
    """
    steps = np.bincount(waits.row, minlength=len(duration))
    awaited = np.cumsum(steps) - steps
    steps = np.maximum(steps, 1)
    last = np.cumsum(steps) - 1
    at = (last - steps + 1 - awaited)[waits.row] + np.arange(len(waits.row))
    num_steps = int(steps.sum())
    needs, lag, takes = np.full(num_steps, -1), np.zeros(num_steps), np.zeros(num_steps)
    needs[at], lag[at], takes[last] = np.append(last, -1)[waits.needs], p2p * waits.message, duration

    first = np.append(0, last + 1)[first]
    ends = np.array(_walk(first.tolist(), needs.tolist(), lag.tolist(), takes.tolist()))
    free = np.append(0.0, ends[:-2]) if num_steps else ends[:0]
    free[first[:-1][np.diff(first) > 0]] = 0.0
    return np.maximum(free, ends[needs] + lag)[last], ends[last]


def _walk(first: list[int], needs: list[int], lag: list[float], takes: list[float]) -> list[float]:
    """When each step ends: inf for those that never run, and a 0.0 behind them all, for the steps that need none (-1).

    A rank walks on until it needs what is not there; whoever makes that wakes it.
    """
    num_ranks = len(first) - 1
    owner = np.repeat(np.arange(num_ranks), np.diff(first)).tolist()
    ends = [math.inf] * len(needs) + [0.0]
    clock, reached = [0.0] * num_ranks, first[:-1]
    waiting: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    able = deque(range(num_ranks))
    while able:
        rank = able.popleft()
        now = clock[rank]
        stop = first[rank + 1]
        for step in range(reached[rank], stop):
            arrives = ends[needs[step]] + lag[step]
            if arrives > now:
                if arrives == math.inf:
                    waiting[owner[needs[step]]].append((needs[step], rank))
                    stop = step
                    break
                now = arrives
            now += takes[step]
            ends[step] = now
        clock[rank], reached[rank] = now, stop
        able.extend(other for need, other in waiting[rank] if need < stop)
        waiting[rank] = [(need, other) for need, other in waiting[rank] if need >= stop]
    return ends


def _blocked(rows: Rows, waits: Edges, timed: Ints, stuck: Ints) -> str:
    """What keeps each rank that did not get to its end."""
    _, heads = np.unique(rows.rank[timed[stuck]], return_index=True)
    told = []
    for each in stuck[heads].tolist():
        low, high = np.searchsorted(waits.row, (each, each + 1))
        names = [rows.place(timed[need]) for need in waits.needs[low:high].tolist() if need in stuck]
        told.append(f"{rows.place(timed[each])} waits for {' and '.join(names)}")
    return f"the lists cannot run to their ends: {'; '.join(told)}"
