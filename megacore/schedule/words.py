"""The text forms of many instructions at once: those of one op differ in their numbers only."""

import re

import numpy as np

from megacore.schedule.instruction import FORMS, Instruction, Op
from megacore.schedule.schedule import Instructions


def words(instructions: Instructions) -> list[str]:
    """``str`` of each, many times as fast."""
    table = instructions.table
    found = np.empty(len(table), dtype=object)
    for op in np.unique(table[:, 0]).tolist():
        form = FORMS[Op(op)]
        columns = [Instruction._fields.index(name) for name in re.findall(r"\{(\w+)\}", form)]
        spell = re.sub(r"\{\w+\}", "{}", form).format
        rows = np.flatnonzero(table[:, 0] == op)
        numbers = table[rows][:, columns].T.tolist()
        found[rows] = list(map(spell, *numbers)) if numbers else form
    spelt: list[str] = found.tolist()
    return spelt
