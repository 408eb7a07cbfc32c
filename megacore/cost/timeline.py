"""When each instruction of a schedule ran: predicted by the simulator or measured by the engine, one type for both."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacore.schedule.instruction import COMPUTE
from megacore.schedule.schedule import Schedule

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Timeline:
    """``start[rank][i]`` and ``end[rank][i]`` of ``schedule.ranks[rank][i]``, all ranks by one clock.

    Only computing is work: ranks are idle while they do nothing but send, receive, reduce or wait. The unit of time is
    the caller's (seconds where measured).
    """

    schedule: Schedule
    start: tuple[Times, ...]
    end: tuple[Times, ...]

    def computing(self, rank: int) -> NDArray[np.bool_]:
        """[n] Which of a rank's instructions compute."""
        return np.isin(self.schedule.ranks[rank].op, COMPUTE)

    def busy(self, rank: int) -> float:
        """Time that a rank computes."""
        chosen = self.computing(rank)
        return float((self.end[rank][chosen] - self.start[rank][chosen]).sum())

    @property
    def makespan(self) -> float:
        """From the first rank's first computing to the last one's last."""
        spans = [(self.start[r][c], self.end[r][c]) for r in self._ranks if (c := self.computing(r)).any()]
        return float(max(end.max() for _, end in spans) - min(start.min() for start, _ in spans)) if spans else 0.0

    @property
    def bubble_fraction(self) -> float:
        """1 - busy / (ranks x makespan)."""
        total = len(self.start) * self.makespan
        return 1 - sum(map(self.busy, self._ranks)) / total if total else 0.0

    @property
    def rank_idle(self) -> tuple[float, ...]:
        """Of each rank, the time without computing between its own first and its own last: the zero of the
        zero-bubble papers."""
        idle = []
        for rank in self._ranks:
            chosen = self.computing(rank)
            whole = self.end[rank][chosen].max() - self.start[rank][chosen].min() if chosen.any() else 0.0
            idle.append(float(whole) - self.busy(rank))
        return tuple(idle)

    @property
    def _ranks(self) -> range:
        return range(len(self.start))
