"""Whether all ranks get to the end of their lists when nobody waits with a buffer: a send and its receive, the two
sides of tied weights, and the optimizer steps of all ranks each happen at one moment, for which every side stops.

Lists that end this way end with any buffering (more of it only lets ranks stop less): gloo, NCCL and any message size
are covered. Sums over the copies of a rank and gathers of parameters need no walk of their own: copies follow the same
list, so the one order that is found here serves all of them.
"""

from collections.abc import Sequence

import numpy as np

from megacore.schedule.instruction import Op
from megacore.schedule.rows import Ints, Rows


def check_no_deadlock(rows: Rows, ends: Ints, meeting: Ints) -> None:
    """Walks all lists at once.

    ``ends`` [2 x meetings] are the rows, ascending, at which a rank meets one other; ``meeting`` numbers what happens
    there from 0, each number standing twice. The optimizer steps are each list's last row, or no list has any.

    Raises ValueError that names each rank that never gets on, its instruction, and what that waits for.
    """
    cuts = np.searchsorted(ends, rows.begin)
    stops = [meeting[begin:end].tolist() for begin, end in zip(cuts[:-1], cuts[1:])]
    stuck = _walk(stops, num_meetings=len(ends) // 2)
    if not stuck:
        return
    by_meeting = ends[np.argsort(meeting, kind="stable")].reshape(-1, 2).tolist()
    lines = []
    for rank in range(len(stops)):
        if rank in stuck:
            pair = by_meeting[stuck[rank]]
            here, there = pair if rows.rank[pair[0]] == rank else reversed(pair)
            lines.append(f"{rows.place(here)} waits for {rows.place(there)}")
        elif rows.op[(last := int(rows.begin[rank + 1]) - 1)] == Op.OPTIMIZE:
            lines.append(f"{rows.place(last)} waits for all ranks")
    first = by_meeting[stuck[min(stuck)]]
    place = rows.place(first[0] if rows.rank[first[0]] == min(stuck) else first[1])
    raise ValueError("\n".join([f"{place}: deadlock, if every send waits for its receive:", *lines]))


def _walk(stops: Sequence[Sequence[int]], num_meetings: int) -> dict[int, int]:
    """The meeting at which each rank is left alone; ranks that come to their end are not in it.

    A rank goes on until it comes first to a meeting. Whoever comes second goes on, and so does the first again. The
    order in which ranks are taken changes nothing: whether two meet depends on their lists alone.
    """
    waiting = [-1] * num_meetings  # the rank that came first
    lists = [iter(each) for each in stops]
    stuck: dict[int, int] = {}
    ready = list(range(len(stops)))
    while ready:
        rank = ready.pop()
        for meeting in lists[rank]:
            other = waiting[meeting]
            if other < 0:
                waiting[meeting] = rank
                stuck[rank] = meeting
                break
            ready.append(other)
        else:
            stuck.pop(rank, None)
    return stuck
