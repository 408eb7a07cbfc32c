"""Ranks that take longer for the same work: what each rank's own instructions took in one step, held against its peers.

Only instructions that compute are counted, not waiting for messages, sums and other ranks, in which all ranks are as
slow as the slowest. Peers are the ranks that hold the same stages. With tp > 1 the ranks of a tp group wait for each
other inside their instructions: a group is then slow as a whole, and is named whole.
"""

import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megacore.mesh.collectives import gather_objects
from megacore.mesh.mesh import ParallelMesh
from megacore.pipeline.engine import Marks
from megacore.schedule.instruction import COMPUTE
from megacore.schedule.schedule import Schedule

SLOW = 1.2
"""Times the peers' median."""
SIGMAS = 4.0
"""Robust deviations from it, too, where there are peers enough to tell."""
ENOUGH = 5
NORMAL = 1.4826


@dataclass(frozen=True)
class OwnTime:
    """What one rank's own work took in a step."""

    rank: int
    host: str
    stage: int
    """Its pipeline rank."""
    seconds: float


@dataclass(frozen=True)
class Straggler:
    """A rank and how much longer than its peers it takes."""

    own: OwnTime
    usual: float

    @property
    def text(self) -> str:
        """For people."""
        ratio = self.own.seconds / self.usual
        return (
            f"rank {self.own.rank} ({self.own.host}) takes {ratio:.2f} times as long as its peers: "
            f"{1e3 * self.own.seconds:.1f} ms against {1e3 * self.usual:.1f} ms a step"
        )


def own_time(mesh: ParallelMesh, schedule: Schedule, marks: Marks) -> OwnTime:
    """Of this rank, from the marks of a step; waits for the device."""
    listed = schedule.ranks[mesh.pp.rank]
    computing = [place for place, each in enumerate(listed) if each.op in COMPUTE]
    seconds = sum(marks[place][1].seconds_since(marks[place][0]) for place in computing)
    return OwnTime(mesh.rank, socket.gethostname(), mesh.pp.rank, seconds)


def stragglers(mesh: ParallelMesh, schedule: Schedule, marks: Marks) -> tuple[Straggler, ...]:
    """All of the world; collective, the same on all ranks."""
    return slow_ones(gather_objects(own_time(mesh, schedule, marks), mesh.world))


def slow_ones(times: Sequence[OwnTime]) -> tuple[Straggler, ...]:
    """Those that stand out among ranks of the same stages."""
    found = []
    for stage in sorted({each.stage for each in times}):
        peers = [each for each in times if each.stage == stage]
        usual = statistics.median(each.seconds for each in peers)
        if len(peers) < ENOUGH:
            usual = min(each.seconds for each in peers)  # of two, the median lies between both
            spread = 0.0
        else:
            spread = NORMAL * statistics.median(abs(each.seconds - usual) for each in peers)
        limit = max(SLOW * usual, usual + SIGMAS * spread)
        found += [Straggler(each, usual) for each in peers if each.seconds > limit and usual > 0]
    return tuple(found)
