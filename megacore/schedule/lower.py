"""Adds to lists that compute what a step needs besides: messages, sums of gradients, the optimizer's step.

One pass serves every kind of schedule. Both ends of a message are put where it is made on a common clock, and what is
made at the same tick is sent in one order everywhere. So all messages and all computing have one order that every
rank's list follows, and the earliest open one can always go on: no deadlock, even if a send blocks until its receive.
"""

import numpy as np
from numpy.typing import NDArray

from megacore.schedule.clock import Computing, Ints, clock, computing
from megacore.schedule.instruction import COMPUTE, Instruction, Op
from megacore.schedule.schedule import FIELDS, Instructions, Schedule

Table = NDArray[np.int32]


def lower(schedule: Schedule, tied: bool = False) -> Schedule:
    """The whole list of every rank, from its computing.

    Sends and receives stand where neighbouring stages live on different ranks: a send right after what makes it, its
    receive before the first computing that starts no earlier than that. ``R`` follows a stage's last gradient, ``O``
    ends the list. ``tied`` sums the gradients of a matrix that the first and the last stage share, right before ``O``,
    if they live on different ranks. Evaluations get messages only. Lists that do not only compute are returned as
    they are.

    Raises ValueError with rank, position, instruction and reason where the computing cannot run to its end.
    """
    if not all(np.isin(rank.op, COMPUTE).all() for rank in schedule.ranks):
        return schedule
    all_ = computing(schedule)
    start, end = clock(schedule, all_)
    rank, time, table = _events(schedule, all_, end)
    order = np.argsort(rank, kind="stable")
    bounds = np.searchsorted(rank[order], np.arange(schedule.num_ranks + 1))
    lists = []
    for each, own in enumerate(schedule.ranks):
        added = order[bounds[each] : bounds[each + 1]]
        starts = start[all_.bounds[each] : all_.bounds[each + 1]]
        whole = _insert(own.table, table[added], np.searchsorted(starts, time[added]))
        lists.append(np.concatenate([whole, _ending(schedule, each, tied)]))
    return Schedule(schedule.kind, schedule.num_microbatches, tuple(map(Instructions, lists)))


def _events(schedule: Schedule, all_: Computing, end: Ints) -> tuple[Ints, Ints, Table]:
    """(rank [k], time [k], instruction [k, fields]) of all that is added, in the one order that all ranks follow: by
    time; at the same tick activations, then gradients, then sums."""
    home = np.array([-1, *schedule.home, -1])
    above, below = home[all_.table[:, 1] + 2], home[all_.back[:, 0]]
    activations = np.flatnonzero(all_.forwards & (above >= 0) & (above != all_.rank))
    gradients = np.flatnonzero(all_.takes_back & (below >= 0) & (below != all_.rank))
    sums = _last_gradients(schedule, all_)
    made = np.concatenate([activations, gradients, sums])
    sends = np.full((len(made), FIELDS), -1, dtype=np.int32)
    sends[:, 0] = np.repeat(
        [Op.SEND_ACTIVATION, Op.SEND_GRADIENT, Op.REDUCE], [len(activations), len(gradients), len(sums)]
    )
    sends[:, 1:3] = np.concatenate([all_.table[activations, 1:3], all_.back[gradients], all_.back[sums]])
    sends[:, 3] = np.concatenate([above[activations], below[gradients], np.full_like(sums, -1)])
    sends[len(made) - len(sums) :, 2] = -1

    order = np.argsort(end[made], kind="stable")
    made, sends = made[order], sends[order]
    receives = sends.copy()
    receives[:, 0] += Op.RECEIVE_ACTIVATION - Op.SEND_ACTIVATION
    receives[:, 3] = all_.rank[made]
    # Both ends of a message side by side; the other end of a sum is on rank -1, where nobody looks.
    rank = np.stack([all_.rank[made], sends[:, 3]], axis=1).ravel()
    return rank, np.repeat(end[made], 2), np.stack([sends, receives], axis=1).reshape(-1, FIELDS)


def _last_gradients(schedule: Schedule, all_: Computing) -> Ints:
    """[stages at most] The rows that complete a stage's weight gradients."""
    if not schedule.trains:
        return np.empty(0, dtype=np.int64)
    rows = np.flatnonzero(np.isin(all_.table[:, 0], (Op.BACKWARD, Op.WEIGHT_GRAD, Op.PAIR)))
    stages = all_.back[rows, 0] + schedule.num_stages * all_.rank[rows]
    _, from_the_end = np.unique(stages[::-1], return_index=True)
    return rows[len(rows) - 1 - from_the_end]


def _insert(table: Table, added: Table, before: Ints) -> Table:
    """``added[i]`` before ``table[before[i]]``, which ascends."""
    whole = np.empty((len(table) + len(added), FIELDS), dtype=np.int32)
    place = before + np.arange(len(added))
    rest = np.ones(len(whole), dtype=bool)
    rest[place] = False
    whole[place], whole[rest] = added, table
    return whole


def _ending(schedule: Schedule, rank: int, tied: bool) -> Table:
    """What ends a rank's list after its computing."""
    if not schedule.trains:
        return np.empty((0, FIELDS), dtype=np.int32)
    ending = [Instruction(Op.OPTIMIZE)]
    last = schedule.num_stages - 1
    first_home, last_home = schedule.home[0], schedule.home[last]
    if tied and first_home != last_home:
        if rank == first_home:
            ending.insert(0, Instruction(Op.TIED, 0, peer=last_home))
        if rank == last_home:
            ending.insert(0, Instruction(Op.TIED, last, peer=first_home))
    return Instructions.of(ending).table
