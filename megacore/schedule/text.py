"""Schedules as text files, to read and to write by hand.

::

    # two ranks, two microbatches; what follows a hash is a comment
    0: F0.0 F0.1 B0.0 B0.1
    1: F1.0 B1.0 F1.1 B1.1

A line gives a pipeline rank and its instructions; a later line of the same rank goes on where it ended.
"""

import re
from typing import NamedTuple

from megacore.schedule.instruction import Instruction, Op
from megacore.schedule.schedule import Instructions, Schedule
from megacore.schedule.words import words

_LINE = re.compile(r"(0|[1-9][0-9]{0,5})\s*:(.*)")


class _Word(NamedTuple):
    line: int
    instruction: Instruction

    def fault(self, reason: str) -> ValueError:
        return ValueError(f"line {self.line}, {self.instruction}: {reason}")


def to_text(schedule: Schedule) -> str:
    """One line per rank, under a comment that says what they are."""
    title = f"# {schedule.kind}: {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches"
    lines = [" ".join([f"{rank}:", *words(instructions)]) for rank, instructions in enumerate(schedule.ranks)]
    return "\n".join([title, *lines]) + "\n"


def from_text(text: str, kind: str = "file") -> Schedule:
    """The schedule that a text holds, of as many microbatches as it forwards; ``kind`` is what to call it.

    Raises ValueError with line and reason if it holds none. Whether it computes a step is for ``check`` to say.
    """
    ranks: dict[int, list[_Word]] = {}
    first_line: dict[int, int] = {}
    for line, content in enumerate(text.splitlines(), 1):
        content = content.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if not match:
            raise ValueError(f'line {line}: {content[:40]!r} begins with no rank; write "0: F0.0 B0.0"')
        rank = int(match[1])
        first_line.setdefault(rank, line)
        ranks.setdefault(rank, []).extend(_parse(line, word) for word in match[2].split())
    num_ranks = max(ranks, default=-1) + 1
    for rank in range(num_ranks):
        if rank not in ranks:
            raise ValueError(f"line {first_line[num_ranks - 1]}: rank {num_ranks - 1}, but rank {rank} has no line")
    num_microbatches = _check_numbers([word for rank in range(num_ranks) for word in ranks[rank]])
    lists = tuple(Instructions.of(word.instruction for word in ranks[rank]) for rank in range(num_ranks))
    return Schedule(kind, num_microbatches, lists)


def _parse(line: int, word: str) -> _Word:
    try:
        return _Word(line, Instruction.parse(word))
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from None


def _check_numbers(found: list[_Word]) -> int:
    """The number of microbatches. Tables are as long as stages and microbatches are many: a slip must not make a huge
    one, so no number may be beyond what the forwards can fill."""
    forwards = [word.instruction for word in found if word.instruction.op in (Op.FORWARD, Op.PAIR)]
    for word in found:
        op, stage, microbatch, *_, back_stage, back_microbatch = word.instruction
        if max(stage, microbatch, back_stage, back_microbatch) >= max(len(forwards), 1) and op is not Op.OPTIMIZE:
            raise word.fault(f"all ranks together have {len(forwards)} forwards, so no number can be that high")
    if not forwards:
        raise ValueError('line 1: no rank forwards anything; write "0: F0.0 B0.0"')
    return max(forward.microbatch for forward in forwards) + 1
