"""Evaluation: every microbatch goes through, none comes back."""

from collections.abc import Sequence

import numpy as np

from megacore.schedule.instruction import Op
from megacore.schedule.schedule import FIELDS, Instructions


def forward(home: Sequence[int], num_microbatches: int) -> tuple[Instructions, ...]:
    """Forwards of stages that live on ranks ``home``, each rank's in the order of the moments at which they could run.

    A forward's moment grows by one from stage to stage, so for any placement no rank waits for itself. On a looped
    pipeline of p ranks rounds of p microbatches go through a chunk before the next one; on a folded one all chunks of a
    rank take turns. Either keeps ranks busy from their first forward to their last where p divides m.

    Two ranks, three microbatches::

        0: F0.0 F0.1 F0.2
        1:      F1.0 F1.1 F1.2
    """
    num_ranks = max(home) + 1
    chunks = -(-len(home) // num_ranks)
    stage, microbatch = (each.ravel() for each in np.indices((len(home), num_microbatches), dtype=np.int32))
    folded = home[0] == home[-1]
    turn = chunks * microbatch if folded else microbatch // num_ranks * num_ranks * chunks + microbatch % num_ranks
    table = np.full((len(stage), FIELDS), -1, dtype=np.int32)
    table[:, 0], table[:, 1], table[:, 2] = Op.FORWARD, stage, microbatch
    table = table[np.argsort(turn + stage, kind="stable")]
    rank = np.asarray(home)[table[:, 1]]
    return tuple(Instructions(table[rank == each]) for each in range(num_ranks))
