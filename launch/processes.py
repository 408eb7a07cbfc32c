"""Runs a function on N local processes, one per rank, as one command: one exit code, one shown cause of failure.

The ranks are forked from a server process that has torch loaded, so torch is imported once, and never by the caller.
They meet through a file in a temporary folder: no port to choose, none that may be in use.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from megacore.launch.failures import Failure, cause, describe
from megacore.launch.worker import Assignment, call, work
from megacore.mesh.rank_info import RankInfo
from megacore.processes import usable_cores

SETTLE_S = 1.5  # after a failure, time for the other ranks to tell theirs: the first heard need not be the cause
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
HELD_BACK = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler sends to all processes of a job: from the fork server and from ranks that do not listen yet."""

DEATHS = frozenset(number.name for number in (signal.SIGTERM, signal.SIGUSR1))
"""Titles of failures that were wishes to stop."""


@dataclass
class Rank:
    """A running process; `answer` is its exit code or how it failed, None while it runs."""

    process: BaseProcess
    connection: Connection
    answer: int | Failure | None = None


@dataclass
class Stop:
    """A wish to stop that came from outside is passed on; a second Ctrl-C kills. So is SIGUSR2, to save."""

    ranks: Sequence[Rank]
    signal: int = 0
    """The first that asked for a stop."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self.send(signal.SIGUSR2)
            return
        if self.signal and number != signal.SIGINT:
            return  # schedulers send it more than once; a save that goes on is not to be lost
        how = signal.SIGKILL if self.signal else signal.SIGTERM
        self.signal = self.signal or number
        self.send(how)

    def send(self, how: int) -> None:
        """To every rank that runs."""
        for rank in self.ranks:
            if rank.process.is_alive() and rank.process.pid is not None:
                os.kill(rank.process.pid, how)


def run_local(
    target: str,
    args: tuple[Any, ...],
    nproc: int,
    write: Callable[[str], object] = sys.stderr.write,
    tell: Callable[[Failure], object] = lambda failure: None,
    stopped: int = 0,
) -> int:
    """Calls `target` ("module:function") as `function(info, *args)` on `nproc` processes, `info` its RankInfo.

    Returns the largest exit code that the ranks return (None is 0; 75, stopped after saving, thus passes through). When
    a rank fails, the others are ended within seconds; `write` is given the cause as text, `tell` as it is, and the code
    is 2 if the user's input was wrong, else 1. SIGINT, SIGTERM and SIGUSR1 reach every rank as one SIGTERM; if they die
    of it the code is ``stopped``, by default 128 + the signal's number. With ``stopped`` a rank that dies of a stop
    signal of its own is no failure either: it did not listen yet, so there was nothing to save.
    One rank runs in this very process, so that debuggers and tracebacks work as ever: what it raises is not caught.
    """
    if nproc < 1:
        raise ValueError(f"--nproc={nproc} must be at least 1")
    if nproc == 1:
        return call(target, RankInfo(), args)
    ranks: list[Rank] = []
    folder = tempfile.TemporaryDirectory(prefix="megacore-", ignore_cleanup_errors=True)
    with passing_on_signals(Stop(ranks)) as stop, folder:  # signals to the end: they come twice
        try:
            for assignment in assignments(target, args, nproc, f"file://{folder.name}/store"):
                ranks.append(start(assignment))
            if stop.signal:
                stop.send(signal.SIGTERM)  # heard while they were being started
            watch(ranks)
        finally:
            for rank in ranks:
                if rank.answer is None or isinstance(rank.answer, Failure):
                    rank.process.kill()
                rank.process.join()
                rank.connection.close()
        return verdict(ranks, stop.signal, write, tell, stopped)


def assignments(target: str, args: tuple[Any, ...], nproc: int, rendezvous: str) -> Iterator[Assignment]:
    """One for each rank; they share this process' cores."""
    for rank in range(nproc):
        info = RankInfo(rank, nproc, rank, nproc, rendezvous)
        yield Assignment(target, args, info, max(1, usable_cores() // nproc))


def start(assignment: Assignment) -> Rank:
    """Forks one rank from the server, which is started by the first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    with held_back():
        forkserver.ensure_running()
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(assignment, theirs), name=f"rank-{assignment.info.rank}")
    process.start()
    theirs.close()
    return Rank(process, ours)


def watch(ranks: Sequence[Rank]) -> None:
    """Returns when every rank has answered, or SETTLE_S after one of them has failed."""
    deadline: float | None = None
    while running := [rank for rank in ranks if rank.answer is None]:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        # Both: a rank may die without a word, and its pipe may be held open by children of its own.
        wait([rank.connection for rank in running] + [rank.process.sentinel for rank in running], left)
        for number, rank in enumerate(ranks):
            if rank.answer is None:
                rank.answer = heard(number, rank)
                if isinstance(rank.answer, Failure) and deadline is None:
                    deadline = time.monotonic() + SETTLE_S


def heard(number: int, rank: Rank) -> int | Failure | None:
    """A rank's answer, a Failure if it has died, None if it still runs."""
    died = not rank.process.is_alive()  # asked first: what it sent before it died is in the pipe by now
    try:
        if rank.connection.poll():
            answer: int | Failure = rank.connection.recv()
            return answer
    except (EOFError, ConnectionResetError):
        rank.process.join()
        died = True
    return Failure.of_exit(number, rank.process.exitcode) if died else None


def verdict(
    ranks: Sequence[Rank],
    stopped_by: int,
    write: Callable[[str], object],
    tell: Callable[[Failure], object],
    stopped: int = 0,
) -> int:
    """The exit code of the whole; the cause of a failure is written."""
    failures = [rank.answer for rank in ranks if isinstance(rank.answer, Failure)]
    if failures:
        first = cause(failures)
        of_a_signal = first.title in DEATHS
        if stopped and of_a_signal:
            return stopped
        if not (stopped_by and (of_a_signal or first.title == "SIGKILL")):
            width = max(60, min(120, shutil.get_terminal_size().columns))
            write(describe(first, len(ranks), width) + "\n")
            tell(first)
        if stopped_by:
            return 128 + stopped_by
        return 2 if first.is_user_error else 1
    return max(rank.answer for rank in ranks if isinstance(rank.answer, int))


@contextmanager
def passing_on_signals(stop: Stop) -> Iterator[Stop]:
    """Signals go to `stop` meanwhile; Python allows this in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (*STOP_SIGNALS, signal.SIGUSR2)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Asked(BaseException):
    """A signal asks for a stop while no rank runs. (No Exception: whoever catches those is not meant.)"""


@contextmanager
def leaving_when_asked() -> Iterator[None]:
    """Before ranks run, between two attempts and after them a wish to stop raises Asked; a wish to save is nothing. In
    the main thread only, as Python has it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _leave) for number in HELD_BACK}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    if number != signal.SIGUSR2:
        raise Asked


@contextmanager
def held_back() -> Iterator[None]:
    """A process started meanwhile gets no signals but SIGINT: they wait until it asks for them. A scheduler sends them
    to all processes of a job: the fork server must outlive them, or the ranks would go down with it before they could
    save. Its children, too, hold them back until they have taken a stand (``worker.work``): none is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        resource_tracker.ensure_running()  # first: it lets go of SIGTERM at its end
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
