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
    split = np.isin(op, (Op.INPUT_GRAD, Op.WEIGHT_GRAD))
    forwards = np.isin(op, (Op.FORWARD, Op.PAIR))
    microbatch, back_microbatch = np.full_like(op, -1), np.full_like(op, -1)
    for chunk in range(len(stages)):
        _count(microbatch, forwards & (front == chunk))
        own = np.isin(op, (Op.BACKWARD, Op.INPUT_GRAD)) & (front == chunk)
        paired = back == chunk
        taken_back = np.full_like(op, -1)
        _count(taken_back, own | paired)
        microbatch[own], back_microbatch[paired] = taken_back[own], taken_back[paired]
        halves = split & (front == chunk)
        microbatch[halves & (op == Op.WEIGHT_GRAD)] = taken_back[halves & (op == Op.INPUT_GRAD)]
    table = np.full((len(op), FIELDS), -1, dtype=np.int32)
    stage_of = np.array([*stages, -1], dtype=np.int32)
    for column, values in enumerate((op, stage_of[front], microbatch)):
        table[:, column] = values
    table[:, 5], table[:, 6] = stage_of[back], back_microbatch
    return Instructions(_truncated(table, num_microbatches))


def _truncated(table: NDArray[np.int32], num_microbatches: int) -> NDArray[np.int32]:
    """Without what belongs to later microbatches."""
    op, late, late_back = table[:, 0], table[:, 2] >= num_microbatches, table[:, 6] >= num_microbatches
    only_front, only_back = (op == Op.PAIR) & ~late & late_back, (op == Op.PAIR) & late & ~late_back
    table[only_front, 0] = Op.FORWARD
    table[only_back, 0], table[only_back, 1:3] = Op.BACKWARD, table[only_back, 5:7]
    table[only_front | only_back, 5:7] = -1
    kept: NDArray[np.int32] = table[~late | only_back]
    return kept


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
