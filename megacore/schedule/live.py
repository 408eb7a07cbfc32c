"""How much each rank keeps: activations from a forward to its input gradient, and what weight gradients wait for.

The unit is one microbatch's activations of all of the rank's stages, so that the papers' figures hold as they stand
(1F1B: min(p - r, m), Narayanan et al. 2021, section 2.2).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megacore.schedule.instruction import Op
from megacore.schedule.schedule import Instructions, Schedule

FORWARDS = (Op.FORWARD, Op.PAIR)
BACKS = (Op.BACKWARD, Op.INPUT_GRAD, Op.PAIR)


def peak_activations(schedule: Schedule) -> tuple[float, ...]:
    """Of each rank, the most (stage, microbatch)s kept at a time, over the number of its stages.

    One is kept from its forward until its B or I has run; both halves of a pair count while it runs. An evaluation
    keeps nothing: 0.
    """
    if not schedule.trains:
        return (0.0,) * schedule.num_ranks
    return tuple(float(live_activations(rank).max(initial=0.0)) for rank in schedule.ranks)


def peak_weight_inputs(schedule: Schedule) -> tuple[float, ...]:
    """The same for what a weight gradient that is put off still needs: kept from I until W has run."""
    return tuple(float(_live(rank, (Op.INPUT_GRAD,), (Op.WEIGHT_GRAD,)).max(initial=0.0)) for rank in schedule.ranks)


def live_activations(rank: Instructions) -> NDArray[np.float64]:
    """[n] What is kept while each of a rank's instructions runs, in the unit above; for training only."""
    return _live(rank, FORWARDS, BACKS)


def _live(rank: Instructions, first: Sequence[Op], last: Sequence[Op]) -> NDArray[np.float64]:
    num_stages = len(np.unique(rank.stage[np.isin(rank.op, FORWARDS)]))
    ends = np.isin(rank.op, last)
    kept = np.cumsum(np.isin(rank.op, first)) - np.cumsum(ends) + ends
    return kept / max(num_stages, 1)
