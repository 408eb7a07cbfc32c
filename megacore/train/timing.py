"""Times the instructions of one step on every pipeline rank, by one clock."""

import numpy as np

from megacore.cost.timeline import Timeline
from megacore.mesh.collectives import barrier, gather_objects
from megacore.mesh.mesh import ParallelMesh
from megacore.pipeline.clock import Mark
from megacore.pipeline.engine import Marks
from megacore.schedule.schedule import Schedule


class StepClock:
    """Begun by all ranks right before a step, which fills ``marks``; time 0 is when they have all begun."""

    def __init__(self, mesh: ParallelMesh) -> None:
        barrier(mesh.pp)  # hosts' clocks have nothing in common but this moment
        self.mesh, self.zero = mesh, Mark(mesh.device)
        self.marks: Marks = {}

    def read(self, schedule: Schedule) -> Timeline:
        """The times of this rank's whole pipeline, in seconds, on each of its ranks; waits for the device."""
        own = np.array([[m.seconds_since(self.zero) for m in self.marks[place]] for place in range(len(self.marks))])
        ranks = gather_objects(own, self.mesh.pp)
        return Timeline(schedule, tuple(each[:, 0] for each in ranks), tuple(each[:, 1] for each in ranks))
