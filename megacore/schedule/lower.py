"""Adds to lists that compute what a step needs besides: messages, sums of gradients, the optimizer's step.

One pass serves every kind of schedule. Both ends of a message are put where it is made on a common clock, and what is
made at the same tick is sent in one order everywhere. So all messages and all computing have one order that every
rank's list follows, and the earliest open one can always go on: no deadlock, even if a send blocks until its receive.
"""

import numpy as np
from numpy.typing import NDArray

from megacore.schedule.clock import clock
from megacore.schedule.instruction import COMPUTE, SENDS, Instruction, Op
from megacore.schedule.rows import Ints, Rows
from megacore.schedule.schedule import FIELDS, Instructions, Schedule

Table = NDArray[np.int32]

OP, PEER = (Instruction._fields.index(name) for name in ("op", "peer"))


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
    rows = Rows(schedule)
    start, end = clock(rows)
    made, table = _added(rows)
    time, owner = np.tile(end[made], 2), np.concatenate([rows.rank[made], table[: len(made), PEER]])
    # One order for all ranks: by time, and both ends of a message side by side; of it each takes what is its own.
    order = np.argsort(end[made], kind="stable")
    order = np.stack([order, order + len(made)], axis=1).ravel()
    order = order[np.argsort(owner[order], kind="stable")]
    cuts = np.searchsorted(owner[order], np.arange(schedule.num_ranks + 1))
    lists = []
    for rank, own in enumerate(schedule.ranks):
        mine = order[cuts[rank] : cuts[rank + 1]]
        starts = start[rows.begin[rank] : rows.begin[rank + 1]]
        whole = _insert(own.table, table[mine], before=np.searchsorted(starts, time[mine]))
        lists.append(Instructions(np.concatenate([whole, _ending(schedule, rank, tied)])))
    return Schedule(schedule.kind, schedule.num_microbatches, tuple(lists))


def _added(rows: Rows) -> tuple[Ints, Table]:
    """What is added: the row [k] that makes each of it, and two instructions [2k, fields]: first all that stand on the
    maker's rank, activations, then gradients, then sums; then their other ends. A sum's is on rank -1: nowhere."""
    home = np.append(rows.home, -1)
    above, below = home[rows.stage + 1], home[rows.back_stage - 1]
    up, down = ((peer >= 0) & (peer != rows.rank) for peer in (above, below))
    backs = rows.having(Op.BACKWARD, Op.INPUT_GRAD, Op.PAIR)
    activations, gradients, sums = rows.forwards[up[rows.forwards]], backs[down[backs]], _last_gradients(rows)

    made = np.concatenate([activations, gradients, sums])
    table = np.full((2 * len(made), FIELDS), -1, dtype=np.int32)
    sends, receives = table[: len(made)], table[len(made) :]
    op, stage, microbatch, peer = sends.T[:4]
    messages = len(activations) + len(gradients)
    op[: len(activations)], op[len(activations) : messages], op[messages:] = (*SENDS, Op.REDUCE)
    stage[:] = np.concatenate([rows.stage[activations], rows.back_stage[made[len(activations) :]]])
    microbatch[:messages] = np.concatenate([rows.microbatch[activations], rows.back_microbatch[gradients]])
    peer[:messages] = np.concatenate([above[activations], below[gradients]])
    receives[:] = sends
    receives[:, OP] += Op.RECEIVE_ACTIVATION - Op.SEND_ACTIVATION
    receives[:, PEER] = rows.rank[made]
    return made, table


def _last_gradients(rows: Rows) -> Ints:
    """The rows that complete a stage's weight gradients; none in an evaluation."""
    found = rows.having(Op.BACKWARD, Op.WEIGHT_GRAD, Op.PAIR)
    last = np.full(len(rows.home), -1)
    last[rows.back_stage[found]] = found
    return last[last >= 0]


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
