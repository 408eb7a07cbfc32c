"""What a rank can be told to do, and its text form.

``F0.3`` forwards microbatch 3 through stage 0, ``B0.3`` takes it back, ``R0`` sums stage 0's gradients over the ranks
that hold copies of it, ``O`` lets the optimizer step.
"""

import re
from dataclasses import dataclass
from enum import StrEnum


class Op(StrEnum):
    """The verbs."""

    FORWARD = "F"
    BACKWARD = "B"
    REDUCE = "R"
    OPTIMIZE = "O"


PER_MICROBATCH = frozenset({Op.FORWARD, Op.BACKWARD})


@dataclass(frozen=True)
class Instruction:
    """One thing for one rank to do; fields that its op does not use are -1."""

    op: Op
    stage: int = -1
    microbatch: int = -1

    def __str__(self) -> str:
        if self.op is Op.OPTIMIZE:
            return "O"
        if self.op in PER_MICROBATCH:
            return f"{self.op}{self.stage}.{self.microbatch}"
        return f"{self.op}{self.stage}"

    @classmethod
    def parse(cls, text: str) -> "Instruction":
        """The inverse of ``str``. Raises ValueError for anything else."""
        match = re.fullmatch(r"([FB])(\d+)\.(\d+)|(R)(\d+)|(O)", text)
        if not match:
            raise ValueError(f"{text!r} is not an instruction; write F0.3, B0.3, R0 or O")
        op, stage, microbatch, reduce, reduce_stage, optimize = match.groups()
        if optimize:
            return cls(Op.OPTIMIZE)
        if reduce:
            return cls(Op.REDUCE, int(reduce_stage))
        return cls(Op(op), int(stage), int(microbatch))


@dataclass(frozen=True)
class Schedule:
    """One list of instructions per pipeline rank, for one training step (or one evaluation)."""

    kind: str
    num_microbatches: int
    ranks: tuple[tuple[Instruction, ...], ...]
