"""When the computing of a schedule would run if a forward took one tick, a whole backward two, and messages none."""

import numpy as np

from megacore.schedule.instruction import Op
from megacore.schedule.rows import Ints, Rows

TICKS = (1, 2, 1, 1, 3)
"""Of F, B, I, W and a pair."""


def clock(rows: Rows) -> tuple[Ints, Ints]:
    """(start, end) [rows] of lists that only compute: each instruction as soon as its rank is free and what it needs
    from neighbouring stages is made. What nobody makes is not waited for: ``check`` tells of it.

    Raises ValueError with rank, position, instruction and reason where ranks wait for each other, and where a stage or
    a microbatch is not forwarded.
    """
    num_stages, num_microbatches = len(rows.home), rows.schedule.num_microbatches
    _check_numbers(rows, num_stages, num_microbatches)
    forwards, backs = rows.forwards, rows.having(Op.BACKWARD, Op.INPUT_GRAD, Op.PAIR)
    # The next stage's key is one stage's worth of microbatches further.
    forwarded = rows.stage[forwards].astype(np.int64) * num_microbatches + rows.microbatch[forwards]
    taken_back = rows.back_stage[backs].astype(np.int64) * num_microbatches + rows.back_microbatch[backs]
    _check_complete(rows, forwarded, num_stages, num_microbatches)

    # A pair takes two steps: its front, which takes no time, and its back, which takes all. So a step has one need.
    pair = rows.op == Op.PAIR
    last = np.cumsum(1 + pair) - 1
    num_steps = len(pair) + np.count_nonzero(pair)
    needs = np.full(num_steps, num_steps)
    for found, keys, step, at in (
        (forwards, forwarded, -num_microbatches, last[forwards] - pair[forwards]),
        (backs, taken_back, num_microbatches, last[backs]),
    ):
        maker = np.full(num_stages * num_microbatches, num_steps)
        maker[keys] = last[found]
        inside = (keys + step >= 0) & (keys + step < len(maker))
        needs[at[inside]] = maker[keys[inside] + step]
    takes = np.zeros(num_steps, dtype=np.int64)
    takes[last] = np.array(TICKS)[rows.op]

    end, waiting = _walk(np.append(0, last + 1)[rows.begin].tolist(), needs.tolist(), takes.tolist())
    if waiting:
        row = np.repeat(np.arange(len(pair)), 1 + pair)
        told = [f"{rows.place(row[step])} waits for {rows.place(row[need])}" for step, need in sorted(waiting)]
        raise ValueError("\n".join([f"{rows.place(row[min(waiting)[0]])}: ranks wait for each other:", *told]))
    ends = np.array(end)[last]
    return ends - takes[last], ends


def _walk(first: list[int], needs: list[int], takes: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """(end [steps + 1], the step and its need of each rank that never gets on). Rank r has steps ``first[r]`` to
    ``first[r + 1]``; a need of ``steps`` is none.

    A rank walks on until it needs what is not there; whoever makes that wakes it.
    """
    never = sum(takes) + 1
    end = [never] * len(takes) + [0]
    reached, clock = first[:-1], [0] * (len(first) - 1)
    waiting: dict[int, list[int]] = {}
    able = list(range(len(clock)))
    while able:
        rank = able.pop()
        now = clock[rank]
        for step in range(reached[rank], first[rank + 1]):
            there = end[needs[step]]
            if there > now:
                if there == never:
                    waiting.setdefault(needs[step], []).append(rank)
                    clock[rank], reached[rank] = now, step
                    break
                now = there
            now += takes[step]
            end[step] = now
            if step in waiting:
                able += waiting.pop(step)
    return end, [(reached[rank], need) for need, ranks in waiting.items() for rank in ranks]


def _check_numbers(rows: Rows, num_stages: int, num_microbatches: int) -> None:
    beyond = np.maximum(rows.stage, rows.back_stage) >= num_stages
    rows.refuse(np.flatnonzero(beyond), "no rank forwards its stage")
    beyond = np.maximum(rows.microbatch, rows.back_microbatch) >= num_microbatches
    rows.refuse(np.flatnonzero(beyond), f"microbatches are 0 to {num_microbatches - 1}")


def _check_complete(rows: Rows, forwarded: Ints, num_stages: int, num_microbatches: int) -> None:
    """Raises ValueError unless every stage forwards every microbatch; in little memory even if numbers are huge, since
    n forwards leave a gap among the first n + 1 keys."""
    seen = np.zeros(min(num_stages * num_microbatches, len(forwarded) + 1), dtype=bool)
    seen[forwarded[forwarded < len(seen)]] = True
    if not seen.all():
        stage, microbatch = divmod(int(seen.argmin()), num_microbatches)
        home = int(rows.home[stage])
        place = f"{rows.end(home)}: " if home >= 0 else ""
        raise ValueError(f"{place}F{stage}.{microbatch} is missing; stages are 0 to {num_stages - 1}")
