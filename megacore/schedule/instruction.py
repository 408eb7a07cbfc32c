"""What a pipeline rank can be told to do, and its text form.

| text | op | meaning |
|---|---|---|
| ``F0.3`` | forward | microbatch 3 goes through stage 0 |
| ``B0.3`` | backward | it comes back: gradients of the stage's input and of its weights |
| ``I0.3``, ``W0.3`` | input grad, weight grad | the two halves of a backward, apart (Qi et al. 2023, zero bubble) |
| ``FB0.3:7.1`` | pair | ``F0.3`` and ``B7.1``, free to overlap (DeepSeek-V3, section 3.2.1) |
| ``SA0.3>1``, ``RA0.3<0`` | send, receive activation | what stage 0 made of microbatch 3: to rank 1; from rank 0 |
| ``SG1.3>0``, ``RG1.3<1`` | send, receive gradient | the gradient of stage 1's input: to rank 0; from rank 1 |
| ``R0`` | reduce | stage 0's gradients are summed over the ranks that hold copies of it |
| ``T0~3`` | tied | the gradients of stage 0's tied weights are summed with those of rank 3's copies |
| ``G0.2``, ``X0.2`` | gather, free | the parameters of stage 0's unit 2 (an embedding, a block, a head) |
| ``O`` | optimize | the optimizer steps |

A message bears the number of the stage that made it, so both of its ends read alike. Ranks are pipeline ranks.
"""

import re
from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple


class Op(IntEnum):
    """The verbs."""

    FORWARD = 0
    BACKWARD = 1
    INPUT_GRAD = 2
    WEIGHT_GRAD = 3
    PAIR = 4
    SEND_ACTIVATION = 5
    RECEIVE_ACTIVATION = 6
    SEND_GRADIENT = 7
    RECEIVE_GRADIENT = 8
    REDUCE = 9
    TIED = 10
    GATHER = 11
    FREE = 12
    OPTIMIZE = 13


COMPUTE = (Op.FORWARD, Op.BACKWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD, Op.PAIR)
SENDS = (Op.SEND_ACTIVATION, Op.SEND_GRADIENT)
RECEIVES = (Op.RECEIVE_ACTIVATION, Op.RECEIVE_GRADIENT)
MESSAGES = SENDS + RECEIVES
BY_UNIT = (Op.FORWARD, Op.BACKWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD, Op.REDUCE)
"""What can be done for one unit of a stage, and is then written with it: ``F0.3/2``, ``R0/2``."""


class Instruction(NamedTuple):
    """One thing for one rank to do; fields that its op does not use are -1."""

    op: Op
    stage: int = -1
    microbatch: int = -1
    peer: int = -1
    """The other pipeline rank of a message or of tied weights."""
    unit: int = -1
    """Of the stage's units, the one gathered or freed."""
    back_stage: int = -1
    back_microbatch: int = -1
    """What a pair takes back; ``stage`` and ``microbatch`` say what it forwards."""

    def __str__(self) -> str:
        text = FORMS[self.op].format_map(self._asdict())
        return f"{text}/{self.unit}" if self.unit >= 0 and self.op in BY_UNIT else text

    @classmethod
    def parse(cls, text: str) -> "Instruction":
        """The inverse of ``str``. Raises ValueError for anything else."""
        for op, pattern in _PATTERNS.items():
            match = pattern.fullmatch(text)
            if match and all(int(number or 0) < 2**31 for number in match.groups()):
                return cls(op, **{name: int(number) for name, number in match.groupdict().items() if number})
        raise ValueError(f"{text!r} is not an instruction; write one of {EXAMPLES}")


FORMS: Mapping[Op, str] = MappingProxyType(
    {
        Op.FORWARD: "F{stage}.{microbatch}",
        Op.BACKWARD: "B{stage}.{microbatch}",
        Op.INPUT_GRAD: "I{stage}.{microbatch}",
        Op.WEIGHT_GRAD: "W{stage}.{microbatch}",
        Op.PAIR: "FB{stage}.{microbatch}:{back_stage}.{back_microbatch}",
        Op.SEND_ACTIVATION: "SA{stage}.{microbatch}>{peer}",
        Op.RECEIVE_ACTIVATION: "RA{stage}.{microbatch}<{peer}",
        Op.SEND_GRADIENT: "SG{stage}.{microbatch}>{peer}",
        Op.RECEIVE_GRADIENT: "RG{stage}.{microbatch}<{peer}",
        Op.REDUCE: "R{stage}",
        Op.TIED: "T{stage}~{peer}",
        Op.GATHER: "G{stage}.{unit}",
        Op.FREE: "X{stage}.{unit}",
        Op.OPTIMIZE: "O",
    }
)
EXAMPLES = "F0.3 B0.3 I0.3 W0.3 FB0.3:7.1 SA0.3>1 RA0.3<0 SG1.3>0 RG1.3<1 R0 T0~3 G0.2 X0.2 O"

NUMBER = r"(?P<\1>0|[1-9][0-9]*)"  # without leading zeros


def _pattern(op: Op) -> re.Pattern[str]:
    """{stage} becomes a named group of digits, the rest stands for itself."""
    unit = r"(?:/\{unit\})?" if op in BY_UNIT else ""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", NUMBER, re.escape(FORMS[op]) + unit))


_PATTERNS = MappingProxyType({op: _pattern(op) for op in FORMS})
