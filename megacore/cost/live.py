"""How many microbatches of each of its stages a pipeline rank keeps at once: of a kind of schedule, without its list.

Ranks of 1F1B's family work in turns: forward t, then what comes back w turns after its own forward, then the weight
gradient of what came back ``lag`` turns before. So after the forward of turn t chunk c has F_c(t+1) - B_c(t-w)
microbatches alive, F_c counting the forwards of c among the first turns and B_c what came back. Steady turns repeat
themselves, so that a few rounds show all that many microbatches do. The folded kinds' lists are short, and counted.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megacore.config.pipeline import V_SHAPED
from megacore.schedule.generators.generate import generate
from megacore.schedule.generators.one_forward_one_backward import long_warm_up, usual_warm_up
from megacore.schedule.generators.placement import fold, loop
from megacore.schedule.instruction import Op
from megacore.schedule.live import BACKS, FORWARDS
from megacore.schedule.schedule import Instructions, Schedule
from megacore.schedule.text import from_text

Counts = NDArray[np.int64]


class Live(NamedTuple):
    """What one rank keeps, at each of the moments that may be its worst, of its ``stages``, ascending.

    ``kept`` [moments, chunks] are microbatches between their forward and their input gradient, ``late`` [moments,
    chunks] those whose weight gradients are put off.
    """

    stages: tuple[int, ...]
    kept: Counts
    late: Counts
    ended: NDArray[np.bool_]
    """[moments] Whether the moment is the end of an input gradient, at whose beginning the rest are."""

    def peak(self, kept: Counts, late: Counts, beginning: int = 0, end: int = 0) -> int:
        """The most bytes at once, of so many for a microbatch of each stage; and so many more at the beginning or at
        the end of an input gradient."""
        return int((self.kept @ kept + self.late @ late + np.where(self.ended, end, beginning)).max(initial=0))


def _place(stages: Counts, stage: int) -> tuple[int, int]:
    rank, chunk = np.argwhere(stages == stage)[0].tolist()
    return rank, chunk


class LiveTable:
    """All ranks' moments in one table, so that a layout is priced at once. ``stages`` [ranks, chunks]."""

    def __init__(self, ranks: tuple[Live, ...]) -> None:
        if len({len(rank.stages) for rank in ranks}) > 1:
            raise ValueError(f"ranks have {[len(rank.stages) for rank in ranks]} stages; give all the same number")
        self.stages = np.array([rank.stages for rank in ranks])
        self.kept, self.late = (np.concatenate([rank[which] for rank in ranks]) for which in (1, 2))
        self.ended = np.concatenate([rank.ended for rank in ranks])
        self.rank = np.repeat(np.arange(len(ranks)), [len(rank.ended) for rank in ranks])
        self.begin = np.concatenate([[0], np.cumsum([len(rank.ended) for rank in ranks])[:-1]])
        self.puts_off = bool(self.late.any())
        self.first, self.last = (_place(self.stages, stage) for stage in (0, int(self.stages.max())))
        """(rank, chunk) of the first and of the last stage."""
        mine = self.rank == self.last[0]
        self.most_at_last = int(self.kept[mine, self.last[1]].max(initial=0))
        """Microbatches that the last stage keeps at once."""

    def peaks(self, kept: Counts, late: Counts, beginning: Counts, end: Counts) -> Counts:
        """``Live.peak`` of every rank [ranks]; sizes are [ranks, chunks], what comes on top [ranks]."""
        total = np.einsum("mc,mc->m", self.kept, kept[self.rank])
        if self.puts_off:
            total += np.einsum("mc,mc->m", self.late, late[self.rank])
        total += np.where(self.ended, end[self.rank], beginning[self.rank])
        most: Counts = np.maximum.reduceat(total, self.begin)
        return most


ROUNDS = 8
"""Rounds of p microbatches that show all that more of them do: warm-up and lag are of six at most."""


def table_of_kind(kind: str, num_ranks: int, num_microbatches: int, chunks: int) -> LiveTable:
    """``live_of_kind`` as a table, made once for all numbers of microbatches that are alike."""
    if kind in V_SHAPED:
        num_microbatches = min(num_microbatches, 4 * num_ranks)
    elif kind in LAGS:
        num_microbatches -= max(0, -(-num_microbatches // num_ranks) - ROUNDS) * num_ranks
    return _table(kind, num_ranks, num_microbatches, chunks)


@cache
def _table(kind: str, num_ranks: int, num_microbatches: int, chunks: int) -> LiveTable:
    return LiveTable(live_of_kind(kind, num_ranks, num_microbatches, chunks))


LAGS = MappingProxyType({"1f1b": -1, "interleaved": -1, "zb-h1": 1, "zb-h2": 2})
"""By how many ranks' numbers weight gradients lag behind; -1: backwards are whole."""


def live_of_kind(kind: str, num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Live, ...]:
    """Of every rank. ``kind`` may also be the text file of one's own list, which is read then."""
    p, m = num_ranks, num_microbatches
    if kind == "gpipe":
        whole, no = np.full((1, chunks), m), np.zeros(1, dtype=bool)
        return tuple(Live(loop(rank, p, chunks), whole, np.zeros_like(whole), no) for rank in range(p))
    if kind in LAGS:
        warm_up: Callable[[int, int, int], int] = long_warm_up if kind == "zb-h2" else usual_warm_up
        lag = LAGS[kind]
        return tuple(
            _of_turns(rank, p, m, chunks, warm_up(rank, p, chunks), lag * rank if lag > 0 else -1) for rank in range(p)
        )
    if kind in V_SHAPED:
        schedule = generate(kind, p, min(m, 4 * p), chunks)
        return tuple(live_of_list(rank, fold(number, p)) for number, rank in enumerate(schedule.ranks))
    return of_schedule(from_text(Path(kind).read_text(encoding="utf-8"), kind=kind))


def of_schedule(schedule: Schedule) -> tuple[Live, ...]:
    """The same of any schedule's list."""
    homes = [tuple(np.flatnonzero(np.equal(schedule.home, rank)).tolist()) for rank in range(schedule.num_ranks)]
    return tuple(live_of_list(rank, stages) for rank, stages in zip(schedule.ranks, homes, strict=True))


def live_of_list(rank: Instructions, stages: tuple[int, ...]) -> Live:
    """Counted instruction by instruction: while each runs, and after it."""
    at = np.array(stages)[None, :]
    own, back = rank.stage[:, None] == at, np.where(rank.op == Op.PAIR, rank.back_stage, rank.stage)[:, None] == at
    starts = own & np.isin(rank.op, FORWARDS)[:, None]
    ends = back & np.isin(rank.op, BACKS)[:, None]
    later = back & (rank.op == Op.INPUT_GRAD)[:, None]
    done = own & (rank.op == Op.WEIGHT_GRAD)[:, None]
    after, waiting = (np.cumsum(a, 0) - np.cumsum(b, 0) for a, b in ((starts, ends), (later, done)))
    computes = rank.op != Op.WEIGHT_GRAD  # which needs nothing but what it frees
    return _moments(stages, ((after + ends)[computes], (waiting + done - later)[computes]), (after, waiting))


def _of_turns(rank: int, p: int, m: int, chunks: int, warm_up: int, lag: int) -> Live:
    period = p * chunks
    enough = 2 + -(-(warm_up + max(lag, 0)) // period)
    m -= max(0, -(-m // p) - enough) * p
    forward = np.tile(np.repeat(np.arange(chunks), p), -(-m // p))
    n = len(forward)
    begun = np.zeros((n + 1, chunks), dtype=np.int64)
    np.cumsum(forward[:, None] == np.arange(chunks), axis=0, out=begun[1:])
    begun = np.minimum(begun, m)
    back = begun[:, ::-1]
    turn = np.arange(n + warm_up + max(lag, 0) + 1)
    alive = begun[np.clip(turn + 1, 0, n)]
    before, after = (back[np.clip(turn - warm_up + one, 0, n)] for one in (0, 1))
    done = back[np.clip(turn - warm_up - lag, 0, n)] if lag >= 0 else before
    return _moments(
        loop(rank, p, chunks),
        (alive - before, before - done),
        (alive - after, after - done if lag >= 0 else after - after),
    )


def _moments(stages: tuple[int, ...], begins: tuple[Counts, Counts], ends: tuple[Counts, Counts]) -> Live:
    """(kept, late) at beginnings and at ends, each different moment once."""
    tables = [
        np.concatenate([kept, late, np.full((len(kept), 1), ended)], axis=1)
        for ended, (kept, late) in enumerate((begins, ends))
    ]
    rows, n = np.unique(np.concatenate(tables), axis=0), len(stages)
    return Live(stages, rows[:, :n], rows[:, n : 2 * n], rows[:, 2 * n].astype(bool))
