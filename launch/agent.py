"""torch.distributed's elastic agent, as a training run wants it. Brings torch.

The agent starts a node's ranks, watches them, and meets the other nodes again whenever somebody has failed or joined.
What it lacks for training, and `Agent` adds:

- *A stop is no fault.* SIGTERM, SIGUSR1 and SIGINT are passed on to the ranks, which save and stop, on all nodes.
- *Restarts are counted by progress*: their limit holds between two checkpoints, not for a run of months.
- *One cause.* Of a node's failed ranks the first that does not just report a lost peer is shown.
- *Nobody is waited for in vain.* Ranks beside a failed one are killed, not asked: they hang in a collective.
- *Growth loses nothing.* Where a node comes in addition, the run saves before it goes on with more ranks.

`run_node` does besides what the agent leaves to others: it looks for a meeting point again that was lost.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousGracefulExitError,
    RendezvousTimeoutError,
)

from megacore.config.schema import RunConfig
from megacore.exits import STOPPED
from megacore.launch.endings import NODE, VARIABLE, Endings
from megacore.launch.failures import Failure, cause, describe
from megacore.launch.processes import SETTLE_S
from megacore.launch.rendezvous import LOST, Nodes, Place, meeting
from megacore.launch.restarts import Restarts, newest_step
from megacore.launch.roll import Roll
from megacore.launch.terminal import page_width
from megacore.mesh.meeting import PortInUse

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LOOK_EVERY_S = 0.5
"""How often ranks are looked at."""
FAREWELL_S = 30
"""For the others' ends, once this node's ranks have ended."""
USER_ERROR = 2
PORTS = 5
"""So many others are tried where the port that was free for the ranks has been taken before rank 0 could listen."""
ENDLESS = 1_000_000
FAULT = "megacore/fault"
"""Where a node tells the others of its round why it starts again."""


class Asked(Exception):
    """The job is asked to stop while no rank runs."""


@dataclass
class Outcome:
    """What this node knows of the job, from attempt to attempt."""

    endings: Endings
    restarts: Restarts
    write: Callable[[str], object] = sys.stderr.write
    asked: int = 0
    """The first signal that asked for an end."""
    code: int = 0
    began: bool = False
    """Whether ranks have run since the meeting point was found."""
    pids: dict[int, int] = field(default_factory=dict)
    """Of the running ranks, which are leaders of their process groups."""
    ports: int = 0
    """So many in a row were taken."""
    roll: Roll = field(default_factory=Roll)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """A signal: the ranks are asked to save and stop; a second Ctrl-C kills them."""
        if self.asked and number != signal.SIGINT:
            return  # schedulers send it to every process, and through every launcher
        how = signal.SIGKILL if self.asked else signal.SIGTERM
        self.asked = self.asked or number
        if not self.pids:
            raise Asked
        self.send(how)

    def send(self, how: signal.Signals) -> None:
        """To every rank that runs."""
        for pid in self.pids.values():
            with suppress(ProcessLookupError):
                os.killpg(pid, how)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals come to ``hear`` meanwhile."""
        before = {number: signal.signal(number, self.hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Agent(LocalElasticAgent):
    """One node's agent, for one stay at a meeting point."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, outcome: Outcome) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=FAREWELL_S)
        self.outcome = outcome

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        with self.outcome.roll.taken(self._rdzv_handler):
            super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self.outcome.asked:
            raise Asked
        self.outcome.endings.forget()
        spec = worker_group.spec
        if self.outcome.restarts.got_on and "checkpoint.resume=auto" not in spec.args:
            spec.args = (*spec.args, "checkpoint.resume=auto")
        started: dict[int, Any] = super()._start_workers(worker_group)
        self.outcome.pids, self.outcome.began = started, True
        if self.outcome.asked:
            self.outcome.send(signal.SIGTERM)  # heard while they were being started
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = self._codes()
        if any(codes.values()):
            time.sleep(SETTLE_S)  # the others tell theirs: the first heard need not be the cause
            failed = {rank: code for rank, code in self._codes().items() if code}
            self.outcome.send(signal.SIGKILL)
            result = super()._monitor_workers(worker_group)
            self.outcome.pids = {}
            self._judge(worker_group, failed)
            return result
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.SUCCEEDED:
            return self._ended(result)
        return result

    def _codes(self) -> dict[int, int | None]:
        """Exit codes by local rank; None: it runs."""
        handlers: Mapping[int, Any] = getattr(self._pcontext, "subprocess_handlers", {})
        return {rank: handler.proc.poll() for rank, handler in handlers.items()}

    def _ended(self, result: RunResult) -> RunResult:
        """All ranks have ended well: done, stopped, or stopped only so that more nodes can join."""
        stopped = self.outcome.endings.any_stopped()
        self.outcome.code = STOPPED if stopped else 0
        if stopped and not self.outcome.asked and self._rdzv_handler.num_nodes_waiting():
            return RunResult(state=WorkerState.HEALTHY)  # whereupon those who wait are taken in
        self.outcome.pids = {}
        return result

    def _judge(self, worker_group: WorkerGroup, failed: Mapping[int, int | None]) -> None:
        """After a fault: show its cause, and decide whether the ranks start again."""
        outcome, group = self.outcome, worker_group.workers
        offset = group[0].global_rank
        failures = [outcome.endings.failure(offset + rank, code or 0) for rank, code in sorted(failed.items())]
        first = cause(failures)
        if self._another_port(failures):
            return
        outcome.code = USER_ERROR if first.is_user_error or USER_ERROR in failed.values() else 1
        if outcome.asked and all(code == -signal.SIGTERM for code in failed.values()):
            outcome.code = STOPPED  # asked before they had begun: nothing is lost
        elif first.is_user_error or USER_ERROR not in failed.values():
            # (a rank that finds something wrong before it is one of the run has said so itself)
            outcome.write(shown(first, group[0].world_size))
        what = self._agreed(first)
        if outcome.asked or outcome.code != 1 or not outcome.restarts.another(what, worker_group.group_rank == 0):
            self._remaining_restarts = 0

    def _another_port(self, failures: Sequence[Failure]) -> bool:
        """Whether the ranks start again because torch, which had chosen a free port for them, is to choose another one:
        no fault of the run, and not counted as one."""
        outcome = self.outcome
        taken = [failure for failure in failures if failure.title == PortInUse.__name__]
        if not taken or outcome.asked or outcome.ports >= PORTS:
            outcome.ports = 0
            return False
        outcome.ports += 1
        outcome.write(
            "megacore: the port that was free for the ranks to meet has been taken meanwhile; trying another one "
            f"({outcome.ports} of {PORTS})\n"
        )
        self._agreed(taken[0])
        return True

    def _agreed(self, first: Failure) -> str:
        """Tell the other nodes of a cause, or hear theirs."""
        store = self._store
        with suppress(*LOST, RuntimeError):
            if store is not None and first.is_follow_up and store.check([FAULT]):
                return str(store.get(FAULT).decode())
            if store is not None:
                store.set(FAULT, first.summary)
        return first.summary

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY and self.outcome.pids:
            if self._others_failed():
                self.outcome.write("megacore: this node starts its ranks again, since another node's have failed\n")
            else:
                self.outcome.write("megacore: another node joins; saving before the run goes on with it\n")
                self.outcome.send(signal.SIGTERM)
                while None in (codes := self._codes()).values() and not any(codes.values()):
                    time.sleep(LOOK_EVERY_S)
            self.outcome.send(signal.SIGKILL)
        self.outcome.pids = {}
        super()._restart_workers(worker_group)

    def _others_failed(self) -> bool:
        with suppress(*LOST, RuntimeError):
            return self._store is not None and bool(self._store.check([FAULT]))
        return True


def shown(first: Failure, world_size: int) -> str:
    """A cause as a box; what only follows from one elsewhere as a line."""
    if first.is_follow_up:
        return f"megacore: rank {first.rank} of {world_size} ends because another one has ({first.title})\n"
    return describe(first, world_size, page_width()) + "\n"


def run_node(
    config: RunConfig, command: Sequence[str], nodes: Nodes, place: Place, max_restarts: int, wait_s: float
) -> int:
    """Run ``megacore COMMAND`` as ranks of this node until the job is over; the exit code.

    ``config`` is the resolved run. A meeting point that is lost, or not there yet, is looked for ``wait_s`` seconds.
    """
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # we tell what it would, once
    folder = Path(tempfile.mkdtemp(prefix="megacore-node-"))
    endings, logs = folder / "endings", folder / "logs"
    endings.mkdir()
    os.environ |= {VARIABLE: str(endings), NODE: str(os.getpid())}
    roll = Roll(f"{place.host}:{place.port}", nodes.fewest, sys.stderr.write if place.is_host else None)
    outcome = Outcome(Endings(endings), Restarts(config, max_restarts), roll=roll)
    deadline = time.monotonic() + wait_s
    try:
        with outcome.listening():
            while True:
                outcome.began = False
                try:
                    return attempt(outcome, command, nodes, place, wait_s, logs)
                except LOST as reason:
                    if outcome.began:
                        deadline = time.monotonic() + wait_s
                        if not outcome.restarts.another("the meeting point was lost", speaks=False):
                            return 1
                    if (code := gives_up(outcome, place, reason, deadline)) is not None:
                        return code
    except Asked:
        return STOPPED
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def gives_up(outcome: Outcome, place: Place, reason: Exception, deadline: float) -> int | None:
    """After a meeting that failed: the exit code, or None after a moment's rest."""
    if outcome.asked:
        return STOPPED
    config = outcome.restarts.config
    if 0 < config.train.steps <= newest_step(config):
        # a node that died at the very end: the others have finished without it, and nobody comes any more
        outcome.write(f"megacore: nothing is left to do: step {config.train.steps}, the last, is saved\n")
        return 0
    where = f"{place.host}:{place.port}, where the nodes meet,"
    late, roll = time.monotonic() >= deadline, outcome.roll
    # (the node that keeps the list gives up at about the same time: the others may lose it just before)
    if isinstance(reason, RendezvousTimeoutError) or (late and 0 < len(roll.came) < roll.expected):
        what = f"{where} has too few of them: {roll.told()}"
        advice = "look at the words of those that are missing, at --nodes and --job, and for a firewall between them"
    else:
        what = f"{where} is out of reach"
        advice = f"look at the words of the node there, and for a firewall before it ({reason})"
    outcome.write(f"megacore: {what}; {advice if late else 'trying again'}\n")
    if late:
        return 1
    time.sleep(1.0)
    return None


def attempt(outcome: Outcome, command: Sequence[str], nodes: Nodes, place: Place, wait_s: float, logs: Path) -> int:
    """One stay at the meeting point; the exit code. Raises ``LOST`` where it cannot be reached."""
    handler = meeting(nodes, place, wait_s)
    spec = WorkerSpec(
        role="rank",
        local_world_size=nodes.nproc,
        rdzv_handler=handler,
        entrypoint=sys.executable,
        args=("-m", "megacore", *command),
        max_restarts=ENDLESS,
        monitor_interval=LOOK_EVERY_S,
        local_addr=place.address,
    )
    lost = False
    try:
        Agent(spec, DefaultLogsSpecs(log_dir=str(logs)), outcome).run()
        return outcome.code
    except LOST:
        lost = True
        raise
    except RendezvousClosedError:
        if outcome.code != STOPPED:
            outcome.write("megacore: the job is over: another node has ended it, whose words tell why\n")
        return outcome.code or 1
    except RendezvousGracefulExitError:
        return outcome.code
    finally:
        outcome.pids = {}
        if not lost:
            with suppress(*LOST, RuntimeError):
                handler.shutdown()
