"""All ranks' instructions as one set of columns, so that a rule over millions of them is a few lines of numpy."""

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megacore.schedule.instruction import Instruction, Op
from megacore.schedule.schedule import Schedule

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Rows:
    """The instructions of every rank, rank 0's first: row r is one of them, and of two rows of a rank the lower one
    comes earlier.

    ``op``, ``stage``, ``microbatch``, ``peer``, ``unit`` and ``rank`` are [rows]; so are ``back_stage`` and
    ``back_microbatch``, what is taken back: of all but pairs the same as ``stage`` and ``microbatch``.
    """

    def __init__(self, schedule: Schedule) -> None:
        lengths = [len(rank) for rank in schedule.ranks]
        self.schedule = schedule
        self.begin = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        """[ranks + 1] The row of each rank's first instruction, and the number of rows."""
        self.rank: Ints = np.repeat(np.arange(len(lengths)), lengths)
        self._table = np.concatenate([rank.table for rank in schedule.ranks])
        columns = np.ascontiguousarray(self._table.T)
        self.op, self.stage, self.microbatch, self.peer, self.unit, back_stage, back_microbatch = columns
        pair = self.op == Op.PAIR
        self.back_stage = np.where(pair, back_stage, self.stage)
        self.back_microbatch = np.where(pair, back_microbatch, self.microbatch)

    def having(self, *ops: Op) -> Ints:
        """The rows whose op is one of ``ops``, ascending."""
        if len(ops) == 1:
            return np.flatnonzero(self.op == ops[0])
        wanted = np.zeros(len(Op), dtype=bool)
        wanted[list(ops)] = True
        return np.flatnonzero(wanted[self.op])

    @cached_property
    def forwards(self) -> Ints:
        """The rows that forward; ``stage`` and ``microbatch`` say what."""
        return self.having(Op.FORWARD, Op.PAIR)

    @cached_property
    def home(self) -> Ints:
        """[stages] The first rank that forwards each stage; -1 where nobody does."""
        stage = self.stage[self.forwards]
        home = np.full(int(stage.max(initial=-1)) + 1, -1, dtype=np.int64)
        home[stage[::-1]] = self.rank[self.forwards[::-1]]
        return home

    def place(self, row: int) -> str:
        """Where an instruction stands, as users are told."""
        rank = int(self.rank[row])
        op, *fields = self._table[row].tolist()
        text = Instruction(Op(op), *fields) if 0 <= op < len(Op) else f"op {op}"
        return f"rank {rank}, position {row - int(self.begin[rank])}, {text}"

    def refuse(self, rows: Ints, reason: Callable[[int], str] | str) -> None:
        """Raises ValueError for the first of some rows, if there is any."""
        if len(rows):
            row = int(rows.min())
            raise ValueError(f"{self.place(row)}: {reason if isinstance(reason, str) else reason(row)}")

    def end(self, rank: int) -> str:
        """The place of what a rank's list lacks."""
        return f"rank {rank}, position {len(self.schedule.ranks[rank])}, end of list"
