"""When the computing of a schedule would run if a forward took one tick, a whole backward two, and messages none."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megacore.schedule.instruction import Instruction, Op
from megacore.schedule.schedule import Schedule

Ints = NDArray[np.int64]
Which = NDArray[np.bool_]

TICKS = (1, 2, 1, 1, 3)
"""Of F, B, I, W and a pair."""


class Computing(NamedTuple):
    """All computing instructions of all ranks in one table, rank after rank."""

    table: NDArray[np.int32]
    """[n, fields]"""
    rank: Ints
    """[n]"""
    bounds: list[int]
    """[ranks + 1] Rank r has rows ``bounds[r]`` to ``bounds[r + 1]``."""
    forwards: Which
    """[n] F, and the front of a pair."""
    takes_back: Which
    """[n] B, I, and the back of a pair: what makes the gradient of a stage's input."""
    back: NDArray[np.int32]
    """[n, 2] Stage and microbatch taken back, or whose weight gradient is made."""

    def fault(self, row: int, reason: str) -> ValueError:
        """An error that names the instruction's place."""
        rank = int(self.rank[row])
        op, *fields = self.table[row].tolist()
        return ValueError(f"rank {rank}, position {row - self.bounds[rank]}, {Instruction(Op(op), *fields)}: {reason}")


def computing(schedule: Schedule) -> Computing:
    """The one table of a schedule that only computes.

    Raises ValueError where an instruction is of a stage or a microbatch that is never forwarded.
    """
    table = np.concatenate([rank.table for rank in schedule.ranks])
    bounds = np.cumsum([0, *map(len, schedule.ranks)])
    op = table[:, 0]
    pair = op == Op.PAIR
    all_ = Computing(
        table,
        np.repeat(np.arange(schedule.num_ranks), np.diff(bounds)),
        bounds.tolist(),
        pair | (op == Op.FORWARD),
        pair | (op == Op.BACKWARD) | (op == Op.INPUT_GRAD),
        np.where(pair[:, None], table[:, 5:7], table[:, 1:3]),
    )
    num_stages, num_microbatches = schedule.num_stages, schedule.num_microbatches
    for column, limit, noun in ((0, num_stages, "stage"), (1, num_microbatches, "microbatch")):
        beyond = np.maximum(table[:, 1 + column], all_.back[:, column]) >= limit
        if beyond.any():
            raise all_.fault(int(beyond.argmax()), f"{noun}s are 0 to {limit - 1}")
    forwarded = table[all_.forwards, 1].astype(np.int64) * num_microbatches + table[all_.forwards, 2]
    # n forwards leave a gap within the first n + 1 places, however many there are to fill.
    seen = np.zeros(min(num_stages * num_microbatches, len(forwarded) + 1), dtype=bool)
    seen[forwarded[forwarded < len(seen)]] = True
    if not seen.all():
        stage, microbatch = divmod(int(seen.argmin()), num_microbatches)
        raise ValueError(f"F{stage}.{microbatch} of stages 0 to {num_stages - 1} is on no rank's list")
    return all_


def clock(schedule: Schedule, all_: Computing) -> tuple[Ints, Ints]:
    """(start, end) [n] of all instructions, each as soon as its rank and its inputs from other stages allow.

    An input that no rank makes counts as there. Raises ValueError where ranks wait for each other.
    """
    num = len(all_.table)
    last = schedule.num_stages - 1
    keys = schedule.num_stages * schedule.num_microbatches
    front = all_.table[:, 1] * schedule.num_microbatches + all_.table[:, 2]
    back = all_.back[:, 0] * schedule.num_microbatches + all_.back[:, 1]
    maker = np.full((2, keys), num)
    maker[0, front[all_.forwards]] = np.flatnonzero(all_.forwards)
    maker[1, back[all_.takes_back]] = np.flatnonzero(all_.takes_back)
    needs = np.full((2, num), num)
    wants = all_.forwards & (all_.table[:, 1] > 0)
    needs[0, wants] = maker[0, front[wants] - schedule.num_microbatches]
    wants = all_.takes_back & (all_.back[:, 0] < last)
    needs[1, wants] = maker[1, back[wants] + schedule.num_microbatches]
    return _run(all_, needs)


def _run(all_: Computing, needs: Ints) -> tuple[Ints, Ints]:
    """Each rank runs until it lacks an input, and on when that is made. ``needs`` [2, n] are rows, or n for nothing."""
    bounds, (activation, gradient) = all_.bounds, needs.tolist()
    ticks = np.array(TICKS)[all_.table[:, 0]].tolist()
    start, end = [0] * len(ticks), [-1] * len(ticks) + [0]
    at, now = bounds[:-1], [0] * (len(bounds) - 1)
    waiting: dict[int, list[int]] = {}
    ready = list(range(len(now)))
    while ready:
        rank = ready.pop()
        time, row = now[rank], at[rank]
        for row in range(at[rank], bounds[rank + 1]):
            one, other = end[activation[row]], end[gradient[row]]
            if one < 0 or other < 0:
                waiting.setdefault(activation[row] if one < 0 else gradient[row], []).append(rank)
                break
            if one > time:
                time = one
            if other > time:
                time = other
            start[row] = time
            end[row] = time = time + ticks[row]
            if row in waiting:
                ready += waiting.pop(row)
        now[rank], at[rank] = time, row
    if waiting:
        made, ranks = min(waiting.items(), key=lambda item: item[1])
        op, *fields = all_.table[made].tolist()
        reason = f"waits for {Instruction(Op(op), *fields)} of rank {all_.rank[made]}, which waits for it in turn"
        raise all_.fault(at[ranks[0]], reason)
    return np.array(start), np.array(end[:-1])
