"""What must have happened on other ranks before an instruction may start.

A list that computes only and the same list with messages say the same here. In the latter, what an instruction needs
leaves its rank where the send stands, be that right behind its maker or later.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from megacore.schedule.instruction import RECEIVES, SENDS, Op
from megacore.schedule.rows import Bools, Ints, Rows


class Edges(NamedTuple):
    """``row[i]`` starts only when another rank has got through with ``needs[i]``; in order of ``row``."""

    row: Ints
    needs: Ints
    message: Bools
    """Whether what ``needs[i]`` made or sent has to travel then. If not, the two ranks only meet."""


def dependencies(rows: Rows) -> Edges:
    """The edges between the ranks of a schedule.

    Raises ValueError where an instruction stands twice, needs what nobody makes or sends, or stands on its rank before
    what it needs. That a list keeps the other rules is ``schedule.check``'s to prove.
    """
    flow = _Flow(rows)
    parts = [
        flow.edges(FORWARD, needs=FORWARD, step=-1),
        flow.edges(BACKWARD, needs=BACKWARD, step=1),
        flow.edges(BACKWARD, needs=FORWARD),
        flow.edges(WEIGHT, needs=BACKWARD),
        _meetings(rows),
    ]
    row, needs, message = (np.concatenate(column) for column in zip(*parts))
    order = np.argsort(row, kind="stable")
    return Edges(row[order], needs[order], message[order])


def messages(rows: Rows) -> tuple[Ints, Ints]:
    """(sends, receives): the two ends of every message, pairwise."""
    flow = _Flow(rows)
    pairs = []
    for send, receive in zip(SENDS, RECEIVES):
        sends, receives = rows.having(send), rows.having(receive)
        sender = flow.index(sends, flow.keys(sends))[flow.keys(receives)]
        pairs.append((sender[sender >= 0], receives[sender >= 0]))
    sent, received = (np.concatenate(column) for column in zip(*pairs))
    return sent, received


FORWARD, BACKWARD, WEIGHT = range(3)
"""What is done with a stage's microbatch. A backward in halves is, for other stages, done with its input gradient."""

_NAMES = ("forward", "backward", "weight gradient")
_DOES = ((Op.FORWARD, Op.PAIR), (Op.BACKWARD, Op.INPUT_GRAD, Op.PAIR), (Op.WEIGHT_GRAD,))


class _Flow:
    """Activations on their way up the stages, gradients on their way down: who makes them, who sends them."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        num_stages, self.num_microbatches = (
            1 + max(int(column.max(initial=0)) for column in columns)
            for columns in ((rows.stage, rows.back_stage), (rows.microbatch, rows.back_microbatch))
        )
        self.num_keys = num_stages * self.num_microbatches

    def keys(self, found: Ints, back: bool = False) -> Ints:
        """One number for the stage and microbatch of each row; the next stage's is ``num_microbatches`` further."""
        stage, microbatch = self.rows.stage[found], self.rows.microbatch[found]
        if back:
            pair = self.rows.op[found] == Op.PAIR
            stage = np.where(pair, self.rows.back_stage[found], stage)
            microbatch = np.where(pair, self.rows.back_microbatch[found], microbatch)
        keys: Ints = stage.astype(np.int64) * self.num_microbatches + microbatch
        return keys

    def index(self, found: Ints, keys: Ints) -> Ints:
        """[num_keys] The row of each key, -1 where there is none."""
        row = np.full(self.num_keys, -1)
        row[keys] = found
        return row

    @cached_property
    def done_by(self) -> list[tuple[Ints, Ints, Ints]]:
        """Of each thing to do: the rows that do it, their keys, and [num_keys] the row of each key."""
        found = [(self.rows.having(*ops), what == BACKWARD) for what, ops in enumerate(_DOES)]
        keys = [self.keys(*each) for each in found]
        return [(rows, key, self.index(rows, key)) for (rows, _), key in zip(found, keys)]

    @cached_property
    def sent_by(self) -> list[Ints]:
        """Of what forwards and what backwards make: [num_keys] the row that sends it. Empty where nothing is sent."""
        sends = [self.rows.having(op) for op in SENDS]
        return [self.index(each, self.keys(each)) for each in sends] if any(map(len, sends)) else []

    def edges(self, what: int, needs: int, step: int = 0) -> Edges:
        """All that do ``what`` need what ``needs`` made of their microbatch, ``step`` stages further on.

        On one rank that is no edge, but is held against the order of its list.
        """
        refuse, rank = self.rows.refuse, self.rows.rank
        row, key, by_key = self.done_by[what]
        refuse(row[by_key[key] != row], f"the {_NAMES[what]} of its stage and microbatch stands twice")
        key = key + step * self.num_microbatches
        inside = (key >= 0) & (key < self.num_keys)
        row, key = row[inside], key[inside]
        maker = self.done_by[needs][2][key]
        refuse(row[maker < 0], f"the {_NAMES[needs]} that it needs stands nowhere")
        far = rank[row] != rank[maker]
        refuse(row[~far & (maker >= row)], f"the {_NAMES[needs]} that it needs does not stand before it")
        row, key, maker = row[far], key[far], maker[far]
        if not step:
            refuse(row, f"the {_NAMES[needs]} that it needs stands on another rank")
        elif self.sent_by:
            maker = self.sent_by[needs][key]
            refuse(row[maker < 0], f"the {_NAMES[needs]} that it needs stands on another rank and is not sent")
        return Edges(row, maker, np.ones(len(row), dtype=bool))


def _meetings(rows: Rows) -> Edges:
    """Sums of tied weights and the optimizer's steps start once all their ranks have reached them."""
    tied = {(int(rows.rank[row]), int(rows.peer[row])): row for row in rows.having(Op.TIED).tolist()}
    steps = {int(rows.rank[row]): row for row in rows.having(Op.OPTIMIZE).tolist()}
    pairs = [(row, peer, tied.get((peer, rank))) for (rank, peer), row in tied.items()]
    for rank, row in steps.items():
        pairs += [(row, other, steps.get(other)) for other in range(len(rows.begin) - 1) if other != rank]
    needs = []
    for row, other, there in pairs:
        if there is None:
            raise ValueError(f"{rows.place(row)}: rank {other} never joins it")
        if there > rows.begin[other]:
            needs.append((row, there - 1))
    row_of, need = np.array(needs, dtype=np.int64).reshape(-1, 2).T
    return Edges(row_of, need, np.zeros(len(needs), dtype=bool))
