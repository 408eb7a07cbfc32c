"""The time of a schedule by formula: what `cost.simulate` finds of its list, in microseconds instead of milliseconds.

With f, b, w the forward, input gradient and weight gradient of one microbatch on one rank (all of its chunks), t their
sum, p ranks, m microbatches, v chunks, c a message:

    gpipe, 1f1b     sum of all stages' t + (m - 1) max t + 2 (p - 1) c, and c for each further microbatch of 1f1b
    interleaved     m max t + (p - 1) / v mean t
    zb-h1           m max t + (p - 1) (f + b - w)
    zb-h2           m max t + (p - 1) max(f, f + b - 2 w)
    zb-v            m max t + (p - 1) max(f, b) / 2
    dualpipe-v      m max t + (p - 1) (b + 2 c)

and, of those with several chunks or halves, c for each further chunk of a microbatch. The zero-bubble schedules leave
no idling within a rank, but the last rank still begins p - 1 forwards later, and a step ends with the last of all.
(Narayanan et al. 2021, section 2; Qi et al. 2024, tables 1 and 2; DeepSeek-AI 2024, section 3.2.1.) Exact for even
stages and free messages; with uneven ones within a few per cent.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StageTimes:
    """``rows`` [stages, 3]: forward, input gradient, weight gradient; ``home`` is the rank of each stage. ``of_kinds``
    are the rows of stages that differ."""

    rows: NDArray[np.float64]
    home: tuple[int, ...]
    num_ranks: int
    of_kinds: NDArray[np.float64]

    @cached_property
    def ranks(self) -> NDArray[np.float64]:
        """[ranks, 3] The sums of each rank's stages."""
        total = np.zeros((self.num_ranks, 3))
        np.add.at(total, list(self.home), self.rows)
        return total


def pipeline_s(kind: str, times: StageTimes, microbatches: int, p2p: float = 0.0) -> float:
    """Seconds from the first rank's first forward to the last backward of all."""
    p, m = times.num_ranks, microbatches
    whole = times.ranks.sum(axis=1)
    if p == 1:
        return m * float(whole[0])
    most, mean = float(whole.max()), float(whole.mean())
    f, b, w = (float(each) for each in times.ranks.mean(axis=0))
    chunks = len(times.home) // p
    through = float(times.rows.sum()) + 2 * (len(times.home) - 1) * p2p
    if kind == "gpipe":
        each = times.ranks[:, 0].max() + times.ranks[:, 1:].sum(axis=1).max()
        return through + (m - 1) * float(each)
    if kind == "zb-h1":
        rest = (p - 1) * max(0.0, f + b - w)
    elif kind == "zb-h2":
        rest = (p - 1) * max(f, f + b - 2 * w)
    elif kind == "zb-v":
        rest = (p - 1) * max(f, b) / 2
    elif kind == "dualpipe-v":
        rest = (p - 1) * (b + 2 * p2p)
    elif chunks > 1:
        rest = (p - 1) * mean / chunks
    else:
        return through + (m - 1) * (most + p2p)
    return m * most + rest + 2 * (p - 1 + m * (chunks - 1) * 0.5) * p2p
