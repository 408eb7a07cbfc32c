"""Proves that a lowered schedule computes the step (or the evaluation), before anything runs.

Each rule assumes those before it: numbers in range; each stage on one rank; everything computed once; every message
needed, sent and received once, in one order per pair of ranks; everything after what it needs; sums over ranks after
the last gradient; and, over all ranks together, no deadlock.

Tables of rows (see ``Rows``) are int64 [stages, microbatches].
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megacore.schedule.deadlock import check_no_deadlock
from megacore.schedule.instruction import BY_UNIT, COMPUTE, MESSAGES, RECEIVES, SENDS, Instruction, Op
from megacore.schedule.live import live_activations
from megacore.schedule.rows import Bools, Ints, Rows
from megacore.schedule.schedule import Schedule

EVALUATION = (Op.FORWARD, Op.SEND_ACTIVATION, Op.RECEIVE_ACTIVATION, Op.GATHER, Op.FREE)


class Computed(NamedTuple):
    """Tables of the rows that forward, that make the input's gradient, and that add to the weights' gradients; in an
    evaluation the latter two are empty."""

    forward: Ints
    back: Ints
    accumulate: Ints


class Messages(NamedTuple):
    """Tables of the rows that send and that receive what each stage made; -1 where nothing is to be sent."""

    sent: Ints
    received: Ints


def check(schedule: Schedule, max_live: Sequence[float] | None = None) -> Schedule:
    """Returns the schedule if it is right; ``max_live`` bounds each rank's activations (``peak_activations``).

    Raises ValueError "rank R, position P, INSTRUCTION: reason"; positions count from 0, and where an instruction is
    missing the place is the end of its rank's list.
    """
    if not schedule.ranks or schedule.num_microbatches < 1:
        raise ValueError(
            f"a schedule needs ranks and microbatches; this has {schedule.num_ranks} and {schedule.num_microbatches}"
        )
    rows = Rows(schedule)
    _check_numbers(rows)
    _check_stages(rows)
    if not schedule.trains:
        rows.refuse(rows.having(*set(Op) - {*EVALUATION}), "a schedule that takes nothing back may only forward")
    computed = _check_computed(rows)
    activations, gradients = _check_all_messages(rows)
    _check_channels(rows)
    _check_order(rows, computed, activations, gradients)
    _check_units(rows)
    if schedule.trains:
        _check_tied(rows, _check_sums(rows, computed.accumulate[:, -1]))
        _check_steps(rows)
    _check_meetings(rows, activations, gradients)
    if max_live is not None:
        _check_live(rows, max_live)
    return schedule


def _check_numbers(rows: Rows) -> None:
    """Every number that an instruction uses is one there can be (stages are still unbounded)."""
    num_ranks, num_microbatches = rows.schedule.num_ranks, rows.schedule.num_microbatches
    rows.refuse(np.flatnonzero((rows.op < 0) | (rows.op >= len(Op))), "there is no such instruction")

    def refuse(chosen: Ints, bad: Bools, reason: str) -> None:
        rows.refuse(chosen[bad[chosen]], reason)

    staged, numbered = rows.having(*set(Op) - {Op.OPTIMIZE}), rows.having(*COMPUTE, *MESSAGES)
    for stage in (rows.stage, rows.back_stage):
        refuse(staged, stage < 0, "stages count from 0")
    for number in (rows.microbatch, rows.back_microbatch):
        refuse(numbered, (number < 0) | (number >= num_microbatches), f"microbatches are 0 to {num_microbatches - 1}")
    talking = rows.having(*MESSAGES, Op.TIED)
    refuse(talking, (rows.peer < 0) | (rows.peer >= num_ranks), f"ranks are 0 to {num_ranks - 1}")
    refuse(talking, rows.peer == rows.rank, "a rank has nothing to send to itself")
    refuse(rows.having(Op.GATHER, Op.FREE), rows.unit < 0, "units count from 0")
    refuse(rows.having(*BY_UNIT), rows.unit >= 0, "stages are cut into units after the check, not before")


def _check_stages(rows: Rows) -> None:
    """Stages 0 to n-1 live on one rank each, and every rank has some."""
    forwarded = rows.stage[rows.forwards]
    for rank in np.setdiff1d(np.arange(rows.schedule.num_ranks), rows.rank[rows.forwards])[:1]:
        raise ValueError(f"{rows.end(rank)}: the rank forwards no stage")
    numbers = np.unique(forwarded)
    for gap in np.flatnonzero(numbers != np.arange(len(numbers)))[:1]:
        rows.refuse(rows.forwards[forwarded == numbers[gap]], f"nobody forwards stage {gap}, and stages leave no gaps")
    staged, local = rows.having(*set(Op) - {Op.OPTIMIZE}), rows.having(*set(Op) - {*RECEIVES, Op.OPTIMIZE})
    for stage in (rows.stage, rows.back_stage):
        rows.refuse(staged[stage[staged] >= len(numbers)], f"stages are 0 to {len(numbers) - 1}")
    for stage in (rows.stage, rows.back_stage):
        away = local[rows.home[stage[local]] != rows.rank[local]]
        for number in stage[away[:1]].tolist():
            rows.refuse(away, f"stage {number} lives on rank {rows.home[number]}")


def _check_computed(rows: Rows) -> Computed:
    """Every stage and microbatch forwards once and, in training, comes back once: by B, by I and W, or in a pair."""
    _check_size(rows)
    stage, microbatch = rows.back_stage, rows.back_microbatch
    computed = Computed(
        _once(rows, rows.forwards, rows.stage, rows.microbatch, "forwarded"),
        _once(rows, rows.having(Op.BACKWARD, Op.INPUT_GRAD, Op.PAIR), stage, microbatch, "taken back"),
        _once(rows, rows.having(Op.BACKWARD, Op.WEIGHT_GRAD, Op.PAIR), stage, microbatch, "accumulated"),
    )
    if rows.schedule.trains:
        _check_complete(rows, computed.back, rows.home, Op.BACKWARD)
        _check_complete(rows, computed.accumulate, rows.home, Op.WEIGHT_GRAD)
    return computed


def _check_size(rows: Rows) -> None:
    """Refuses what lacks a forward; before tables are made, so that a mistyped number cannot make them huge."""
    num_stages, num_microbatches = len(rows.home), rows.schedule.num_microbatches
    if len(rows.forwards) < num_stages * num_microbatches:
        there = np.unique(
            rows.stage[rows.forwards].astype(np.int64) * num_microbatches + rows.microbatch[rows.forwards]
        )
        gaps = np.flatnonzero(there != np.arange(len(there)))
        stage, microbatch = divmod(int(gaps[0]) if len(gaps) else len(there), num_microbatches)
        raise ValueError(f"{rows.end(int(rows.home[stage]))}: {Instruction(Op.FORWARD, stage, microbatch)} is missing")


def _once(rows: Rows, chosen: Ints, stage: Ints, microbatch: Ints, done: str) -> Ints:
    """The table of the chosen rows; -1 where there is none. ``stage`` and ``microbatch`` are columns of all rows."""
    num_stages, num_microbatches = len(rows.home), rows.schedule.num_microbatches
    key = stage[chosen].astype(np.int64) * num_microbatches + microbatch[chosen]
    table = np.full(num_stages * num_microbatches, -1)
    table[key[::-1]] = chosen[::-1]  # of several, the first stays

    def reason(row: int) -> str:
        first = table[stage[row] * num_microbatches + microbatch[row]]
        return f"microbatch {microbatch[row]} of stage {stage[row]} is {done} already, by {rows.place(first)}"

    rows.refuse(chosen[table[key] != chosen], reason)
    return table.reshape(num_stages, num_microbatches)


def _check_complete(rows: Rows, table: Ints, owner: Ints, op: Op, peer: Ints | None = None) -> None:
    """``owner`` [stages] is the rank that must do it for every microbatch, -1 where nobody must."""
    for stage, microbatch in np.argwhere((table < 0) & (owner[:, None] >= 0))[:1].tolist():
        missing = Instruction(op, stage, microbatch, -1 if peer is None else int(peer[stage]))
        raise ValueError(f"{rows.end(int(owner[stage]))}: {missing} is missing")


def _check_all_messages(rows: Rows) -> tuple[Messages, Messages]:
    """What neighbouring stages on two ranks need of each other is sent once and received once; nothing else is.

    Returns activations and gradients.
    """
    after = np.append(rows.home[1:], -1)
    before = np.insert(rows.home[:-1], 0, -1)
    activations = _check_messages(rows, Op.SEND_ACTIVATION, Op.RECEIVE_ACTIVATION, after)
    if not rows.schedule.trains:
        before = np.full_like(before, -1)
    return activations, _check_messages(rows, Op.SEND_GRADIENT, Op.RECEIVE_GRADIENT, before)


def _check_messages(rows: Rows, send: Op, receive: Op, wants: Ints) -> Messages:
    """``wants`` [stages] is the rank that needs what each stage makes, -1 for none."""
    home = rows.home
    wants = np.where(wants == home, -1, wants)
    sends, receives = rows.having(send), rows.having(receive)
    for chosen, sender, receiver in ((sends, rows.rank, rows.peer), (receives, rows.peer, rows.rank)):
        stage = rows.stage[chosen]
        rows.refuse(chosen[wants[stage] < 0], "no other rank needs it")
        rows.refuse(chosen[sender[chosen] != home[stage]], lambda row: f"it comes from rank {home[rows.stage[row]]}")
        rows.refuse(chosen[receiver[chosen] != wants[stage]], lambda row: f"rank {wants[rows.stage[row]]} needs it")
    messages = Messages(
        _once(rows, sends, rows.stage, rows.microbatch, "sent"),
        _once(rows, receives, rows.stage, rows.microbatch, "received"),
    )
    _check_complete(rows, messages.sent, np.where(wants >= 0, home, -1), send, wants)
    _check_complete(rows, messages.received, wants, receive, home)
    return messages


def _check_channels(rows: Rows) -> None:
    """A rank receives from another in the order in which that one sends (if not, that is the cause of a deadlock)."""
    num_ranks = rows.schedule.num_ranks
    narrow = np.min_scalar_type(num_ranks**2)  # 16 bits sort much faster
    sends, receives = rows.having(*SENDS), rows.having(*RECEIVES)
    sends = sends[np.argsort((rows.rank[sends] * num_ranks + rows.peer[sends]).astype(narrow), kind="stable")]
    receives = receives[
        np.argsort((rows.peer[receives] * num_ranks + rows.rank[receives]).astype(narrow), kind="stable")
    ]
    same = (rows.stage[sends] == rows.stage[receives]) & (rows.microbatch[sends] == rows.microbatch[receives])
    same &= (rows.op[sends] == Op.SEND_ACTIVATION) == (rows.op[receives] == Op.RECEIVE_ACTIVATION)
    sent = dict(zip(receives[~same].tolist(), sends[~same].tolist()))
    rows.refuse(receives[~same], lambda row: f"what comes next from rank {rows.peer[row]} is {rows.place(sent[row])}")


def _check_order(rows: Rows, computed: Computed, activations: Messages, gradients: Messages) -> None:
    """Everything comes after what it needs, and gradients add up in one order in every schedule."""
    forward, back, accumulate = computed
    local = (rows.home[1:] == rows.home[:-1])[:, None]
    _check_before(rows, np.where(local, forward[:-1], activations.received[:-1]), forward[1:])
    _check_before(rows, forward, activations.sent)
    if rows.schedule.trains:
        _check_before(rows, forward, back)
        _check_before(rows, np.where(local, back[1:], gradients.received[1:]), back[:-1])
        _check_before(rows, back, gradients.sent)
        _check_before(rows, back, np.where(accumulate == back, -1, accumulate))
        early = accumulate[:, 1:][accumulate[:, 1:] < accumulate[:, :-1]]
        rows.refuse(early, "a stage's gradients are accumulated in ascending order of microbatch")


def _check_before(rows: Rows, need: Ints, user: Ints) -> None:
    """Tables of what must have run, and of what needs it; a user of -1 needs nothing."""
    early = (user >= 0) & (user <= need)
    needed = dict(zip(user[early].tolist(), need[early].tolist()))
    rows.refuse(user[early], lambda row: f"it needs {rows.place(needed[row])}")


def _check_units(rows: Rows) -> None:
    """Each unit is gathered and freed in turns."""
    chosen = rows.having(Op.GATHER, Op.FREE)
    chosen = chosen[np.lexsort((chosen, rows.unit[chosen], rows.stage[chosen]))]
    op, stage, unit = rows.op[chosen], rows.stage[chosen], rows.unit[chosen]
    same_unit = np.append(False, (stage[1:] == stage[:-1]) & (unit[1:] == unit[:-1]))[: len(chosen)]
    gathered = same_unit & (np.append(Op.FREE, op[:-1])[: len(chosen)] == Op.GATHER)
    rows.refuse(chosen[gathered & (op == Op.GATHER)], "the unit is gathered already")
    rows.refuse(chosen[~gathered & (op == Op.FREE)], "the unit is not gathered")


def _check_sums(rows: Rows, last: Ints) -> Ints:
    """Each stage's gradients are summed over its copies once, after the last is accumulated (rows ``last`` [stages]).

    Returns the rows [stages] that do it.
    """
    sums = rows.having(Op.REDUCE)
    table = np.full(len(rows.home), -1)
    table[rows.stage[sums[::-1]]] = sums[::-1]
    rows.refuse(sums[table[rows.stage[sums]] != sums], "the stage's gradients are summed already")
    for stage in np.flatnonzero(table < 0)[:1].tolist():
        raise ValueError(f"{rows.end(int(rows.home[stage]))}: {Instruction(Op.REDUCE, stage)} is missing")
    _check_before(rows, last, table)
    return table


def _check_tied(rows: Rows, sums: Ints) -> None:
    """The embedding and a head with the same weights, on two ranks, sum their gradients once and both, or neither does;
    after their stages' own sums (rows ``sums`` [stages])."""
    home, tied = rows.home, rows.having(Op.TIED)
    if not len(tied):
        return
    rows.refuse(
        tied[(home[0] == home[-1]) | ~np.isin(rows.stage[tied], (0, len(home) - 1))],
        "only the first and the last stage are tied, across ranks",
    )
    for stage, other in ((0, len(home) - 1), (len(home) - 1, 0)):
        ours = tied[rows.stage[tied] == stage]
        right = Instruction(Op.TIED, stage, peer=int(home[other]))
        rows.refuse(ours[rows.peer[ours] != right.peer], f"stage {other} lives on rank {right.peer}")
        rows.refuse(ours[1:], "tied gradients are summed already")
        if not len(ours):
            raise ValueError(
                f"{rows.end(int(home[stage]))}: {right} is missing, the other side of {rows.place(tied[0])}"
            )
        _check_before(rows, sums[[stage]], ours)


def _check_steps(rows: Rows) -> None:
    """The optimizer steps once on every rank, last of all."""
    ends = rows.begin[1:] - 1
    rows.refuse(np.setdiff1d(rows.having(Op.OPTIMIZE), ends), "the optimizer steps once, last of all")
    for rank in np.flatnonzero(rows.op[ends] != Op.OPTIMIZE)[:1].tolist():
        raise ValueError(f"{rows.end(rank)}: {Instruction(Op.OPTIMIZE)} is missing")


def _check_meetings(rows: Rows, activations: Messages, gradients: Messages) -> None:
    """Numbers the meetings of two ranks for ``check_no_deadlock``: messages, then tied weights."""
    sent, received = (np.concatenate([a[a >= 0], g[g >= 0]]) for a, g in zip(activations, gradients))
    meeting = np.full(len(rows.op), -1)
    meeting[sent] = meeting[received] = np.arange(len(sent))
    meeting[rows.having(Op.TIED)] = len(sent)
    ends = np.flatnonzero(meeting >= 0)
    check_no_deadlock(rows, ends, meeting[ends])


def _check_live(rows: Rows, max_live: Sequence[float]) -> None:
    """No rank keeps more than its bound."""
    if len(max_live) != rows.schedule.num_ranks:
        raise ValueError(f"max_live has {len(max_live)} bounds; the schedule has {rows.schedule.num_ranks} ranks")
    if rows.schedule.trains:
        for rank, most in enumerate(max_live):
            live = live_activations(rows.schedule.ranks[rank])
            over = np.flatnonzero(live > most)
            reason = f"the rank keeps {live[over[:1]].sum():g} microbatches' activations, more than max_live={most:g}"
            rows.refuse(rows.begin[rank] + over, reason)
