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
    num_rows, num_stages, num_microbatches = len(rows.op), len(rows.home), rows.schedule.num_microbatches
    _check_numbers(rows, num_stages, num_microbatches)
    forwards, backs = rows.forwards, rows.having(Op.BACKWARD, Op.INPUT_GRAD, Op.PAIR)
    # The next stage's key is one stage's worth of microbatches further.
    forwarded = rows.stage[forwards].astype(np.int64) * num_microbatches + rows.microbatch[forwards]
    taken_back = rows.back_stage[backs].astype(np.int64) * num_microbatches + rows.back_microbatch[backs]
    _check_complete(rows, forwarded, num_stages, num_microbatches)

    def needed(found: Ints, keys: Ints, step: int) -> list[int]:
        """[rows] The row that makes what is ``step`` keys on; ``num_rows`` where nothing is needed."""
        maker = np.full(num_stages * num_microbatches, num_rows)
        maker[keys] = found
        inside = (keys + step >= 0) & (keys + step < len(maker))
        makers = np.full(num_rows, num_rows)
        makers[found[inside]] = maker[keys[inside] + step]
        return makers.tolist()

    return _walk(rows, needed(forwards, forwarded, -num_microbatches), needed(backs, taken_back, num_microbatches))


def _walk(rows: Rows, activation: list[int], gradient: list[int]) -> tuple[Ints, Ints]:
    """A rank walks on until it needs what is not there; whoever makes that wakes it."""
    begin = rows.begin.tolist()
    ticks = np.array(TICKS)[rows.op].tolist()
    start, end = [0] * len(ticks), [-1] * len(ticks) + [0]
    reached, now = begin[:-1], [0] * (len(begin) - 1)
    waiting: dict[int, list[int]] = {}
    able = list(range(len(now)))
    while able:
        rank = able.pop()
        time = now[rank]
        for row in range(reached[rank], begin[rank + 1]):
            one, other = end[activation[row]], end[gradient[row]]
            if one < 0 or other < 0:
                waiting.setdefault(activation[row] if one < 0 else gradient[row], []).append(rank)
                now[rank], reached[rank] = time, row
                break
            if one > time:
                time = one
            if other > time:
                time = other
            start[row] = time
            end[row] = time = time + ticks[row]
            if row in waiting:
                able += waiting.pop(row)
    if waiting:
        blocked = {reached[rank]: maker for maker, ranks in waiting.items() for rank in ranks}
        told = [f"{rows.place(row)} waits for {rows.place(blocked[row])}" for row in sorted(blocked)]
        raise ValueError("\n".join([f"{rows.place(min(blocked))}: ranks wait for each other:", *told]))
    return np.array(start), np.array(end[:-1])


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
