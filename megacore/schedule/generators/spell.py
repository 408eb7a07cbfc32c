"""The words generators write in: who computes what in which order; microbatches number themselves.

In every schedule here each stage takes its microbatches in ascending order, forwards as backwards. So a rank's list is
known from its verbs and chunks alone: ``F0 F0 B0 B0`` can only mean F0.0 F0.1 B0.0 B0.1.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from megacore.schedule.instruction import Op
from megacore.schedule.schedule import FIELDS, Instructions

Words = NDArray[np.int32]
"""[n, 3] op, chunk, and the chunk that a pair takes back (-1 elsewhere)."""

_WORD = re.compile(r"([FBIW])(\d+)(?:B(\d+))?")
_OPS = (("F", Op.FORWARD), ("B", Op.BACKWARD), ("I", Op.INPUT_GRAD), ("W", Op.WEIGHT_GRAD))


def words(phases: Iterable[tuple[str, int]]) -> Words:
    """Of phases, each a pattern and how often it is repeated: ``("F0 I1 W1", 3)``; ``F0B1`` is a pair."""
    blocks = [np.tile(_pattern(pattern), (max(repeats, 0), 1)) for pattern, repeats in phases]
    return np.concatenate(blocks)


def spell(words: Words, stages: Sequence[int], num_microbatches: int) -> Instructions:
    """A rank's instructions; ``stages[c]`` is its chunk c.

    Every verb of a chunk counts its microbatches from 0 (``B``, ``I`` and a pair's back half count together; the k-th
    ``W`` belongs to the k-th ``I``). What counts past the last microbatch is left out, so that a pattern made for more
    microbatches serves for fewer: dropping whole microbatches breaks no order. A pair that loses a half is the other.
    """
    op, front, back = words.T
    forwards, pair = np.isin(op, (Op.FORWARD, Op.PAIR)), op == Op.PAIR
    back = np.where(np.isin(op, (Op.BACKWARD, Op.INPUT_GRAD)), front, back)
    front_number, back_number = np.full((2, len(op)), -1, dtype=np.int32)
    for chunk in range(len(stages)):
        of_chunk = front == chunk
        _count(front_number, forwards & of_chunk)
        _count(back_number, back == chunk)
        back_number[of_chunk & (op == Op.WEIGHT_GRAD)] = back_number[of_chunk & (op == Op.INPUT_GRAD)]
    rows = Instructions(np.full((len(op), FIELDS), -1, dtype=np.int32))
    stage_of = np.array(stages)
    rows.op[:], rows.stage[:], rows.microbatch[:] = op, stage_of[front], np.where(forwards, front_number, back_number)
    rows.back_stage[pair], rows.back_microbatch[pair] = stage_of[back[pair]], back_number[pair]
    return _truncated(rows, num_microbatches)


def _truncated(rows: Instructions, num_microbatches: int) -> Instructions:
    """Without what belongs to later microbatches."""
    pair = rows.op == Op.PAIR
    late, late_back = rows.microbatch >= num_microbatches, rows.back_microbatch >= num_microbatches
    only_front, only_back = pair & ~late & late_back, pair & late & ~late_back
    rows.op[only_front], rows.op[only_back] = Op.FORWARD, Op.BACKWARD
    rows.stage[only_back], rows.microbatch[only_back] = rows.back_stage[only_back], rows.back_microbatch[only_back]
    rows.back_stage[only_front | only_back] = rows.back_microbatch[only_front | only_back] = -1
    return Instructions(rows.table[~late | only_back])


def _count(into: NDArray[np.int32], where: NDArray[np.bool_]) -> None:
    into[where] = np.arange(np.count_nonzero(where), dtype=np.int32)


def _pattern(text: str) -> Words:
    ops = dict(_OPS)
    rows = []
    for word in text.split():
        match = _WORD.fullmatch(word)
        assert match, word
        verb, chunk, back = match.groups()
        rows.append((ops[verb], int(chunk), -1) if back is None else (Op.PAIR, int(chunk), int(back)))
    return np.array(rows, dtype=np.int32).reshape(-1, 3)
