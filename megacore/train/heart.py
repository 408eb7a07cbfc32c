"""A run's heartbeat: what each rank tells of itself, and how one that is silent or late is named."""

import secrets
import statistics
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path

from megacore.config.schema import RunConfig
from megacore.mesh.collectives import gather_objects
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.rank_info import RankInfo
from megacore.monitor.heartbeat import Beater, Listener
from megacore.monitor.holdups import Finding, Limits
from megacore.monitor.metrics import EventsWriter
from megacore.monitor.pulse import Pulse, waits
from megacore.monitor.run_folder import EVENTS

REMEMBERED = 15
"""Steps whose median is what one usually takes."""
LOOPBACK = "127.0.0.1"


class Heart:
    """Of one rank. A run of one process has nobody to tell, nor to wait for."""

    def __init__(self, config: RunConfig, info: RankInfo, mesh: ParallelMesh) -> None:
        """Begin to beat; collective over the world."""
        self.out, self.mesh, self.pulse = Path(config.out), mesh, Pulse()
        self.listener: Listener | None = None
        self.beater: Beater | None = None
        self.took: deque[float] = deque(maxlen=REMEMBERED)
        self.began: float | None = None
        self.events: EventsWriter | None = None
        """Where findings are written, while the run's own writer is open: those who listen to it hear of them."""
        guard = config.guard
        if mesh.world.size == 1 or not guard.heartbeat:
            return
        limits = Limits(guard.silent_s, guard.abort_s, guard.step_limit_s)
        token = secrets.token_hex(16) if mesh.rank == 0 else ""
        problem = ""
        if mesh.rank == 0:
            try:  # on this machine alone where all ranks are
                here = "" if info.host else LOOPBACK
                self.listener = Listener(limits, self.tell, mesh.world.size, token, here)
            except OSError as reason:
                problem = f"rank 0 cannot listen ({reason})"
        port: int
        port, token = gather_objects((self.listener.port if self.listener else 0, token), mesh.world)[0]
        address = (info.host or LOOPBACK, port)
        try:
            if port:
                ident = threading.get_ident()
                self.beater = Beater(mesh.rank, self.pulse, address, token, limits, self.tell, ident)
        except OSError as reason:
            problem = f"{address[0]} port {port}, where rank 0 listens, cannot be reached ({reason})"
        if problem:
            sys.stderr.write(
                f"megacore: rank {mesh.rank} has no heartbeat: {problem}; open the ports between the nodes, or set "
                "guard.heartbeat=false\n"
            )
        log = mesh.world.log
        if log is not None:
            self.pulse.collectives = lambda: (log.begun, " over ".join(reversed(log.last)))
            self.pulse.counts = lambda: log.counts
        self.pulse.waits = partial(waits, threading.get_ident())

    def step(self, step: int) -> None:
        """A step begins."""
        now = time.monotonic()
        if self.began is not None:
            self.took.append(now - self.began)
            self.pulse.typical_s = statistics.median(self.took)
        self.began = now
        self.pulse.step, self.pulse.doing = step, "step"

    def does(self, what: str) -> None:
        """Something else begins: an evaluation, a save."""
        self.pulse.doing, self.began = what, None

    def close(self) -> None:
        """The run is over."""
        if self.beater is not None:
            self.beater.close()
        if self.listener is not None:
            self.listener.close()

    def tell(self, finding: Finding, stacks: str) -> None:
        """Say who holds up the others, on the terminal and in events.jsonl. (Called from a thread.)"""
        sys.stderr.write(f"megacore: {finding.text}\n{stacks}")
        facts = {"kind": finding.kind, "rank": finding.rank, "seconds": finding.seconds, "text": finding.text}
        if (events := self.events) is not None:
            with suppress(ValueError):  # closed this very moment: the run has ended
                events.write("hang", **facts)
        elif (self.out / EVENTS).exists():
            events = EventsWriter(self.out)
            events.write("hang", **facts)
            events.close()
