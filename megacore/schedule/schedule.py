"""A schedule: one list of instructions per pipeline rank, stored as columns, so that millions of them stay cheap."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from megacore.schedule.instruction import Instruction, Op

FIELDS = len(Instruction._fields)


class Instructions(Sequence[Instruction]):
    """A rank's instructions in order: a sequence of ``Instruction``, held as a table int32 [n, fields]."""

    def __init__(self, table: NDArray[np.int32]) -> None:
        assert table.ndim == 2 and table.shape[1] == FIELDS, table.shape
        self.table = table

    @classmethod
    def of(cls, instructions: Iterable[Instruction]) -> "Instructions":
        """The table of some instructions."""
        return cls(np.array(list(instructions), dtype=np.int32).reshape(-1, FIELDS))

    @classmethod
    def parse(cls, text: str) -> "Instructions":
        """Of instructions with white space between them. Raises ValueError for anything else."""
        return cls.of(map(Instruction.parse, text.split()))

    @property
    def op(self) -> NDArray[np.int32]:
        """[n] codes of ``Op``."""
        return self.table[:, 0]

    @property
    def stage(self) -> NDArray[np.int32]:
        """[n]"""
        return self.table[:, 1]

    @property
    def microbatch(self) -> NDArray[np.int32]:
        """[n]"""
        return self.table[:, 2]

    @property
    def peer(self) -> NDArray[np.int32]:
        """[n]"""
        return self.table[:, 3]

    @property
    def back_stage(self) -> NDArray[np.int32]:
        """[n]"""
        return self.table[:, 5]

    @property
    def back_microbatch(self) -> NDArray[np.int32]:
        """[n]"""
        return self.table[:, 6]

    def having(self, *ops: Op) -> "Instructions":
        """Those whose op is one of ``ops``."""
        return Instructions(self.table[np.isin(self.op, ops)])

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Instruction: ...
    @overload
    def __getitem__(self, index: slice) -> "Instructions": ...
    def __getitem__(self, index: int | slice) -> "Instruction | Instructions":
        if isinstance(index, slice):
            return Instructions(self.table[index])
        op, *fields = self.table[index].tolist()
        return Instruction(Op(op), *fields)

    def __iter__(self) -> Iterator[Instruction]:
        for op, *fields in self.table.tolist():
            yield Instruction(Op(op), *fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instructions) and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash(self.table.tobytes())

    def __str__(self) -> str:
        return " ".join(map(str, self))

    def __repr__(self) -> str:
        return f"Instructions({len(self)})"


@dataclass(frozen=True)
class Schedule:
    """What every pipeline rank does in one training step (or one evaluation) of ``num_microbatches``.

    As a generator gives it, a rank's list computes only (``F B I W FB``); ``lower`` adds messages, reductions and the
    optimizer step.
    """

    kind: str
    num_microbatches: int
    ranks: tuple[Instructions, ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.ranks)

    @cached_property
    def home(self) -> tuple[int, ...]:
        """The rank of each stage, by who forwards it; -1 where nobody does. Stages count from 0."""
        stages = [np.unique(rank.stage[np.isin(rank.op, (Op.FORWARD, Op.PAIR))]) for rank in self.ranks]
        home = np.full(max((int(each[-1]) + 1 for each in stages if len(each)), default=0), -1)
        for rank, each in enumerate(stages):
            home[each] = rank
        return tuple(home.tolist())

    @property
    def num_stages(self) -> int:
        """Stages, over all ranks."""
        return len(self.home)

    @property
    def trains(self) -> bool:
        """Whether anything comes back: False for an evaluation."""
        return any(bool(np.isin(rank.op, (Op.BACKWARD, Op.INPUT_GRAD, Op.PAIR)).any()) for rank in self.ranks)
