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
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from megacore.launch.failures import Failure, cause, describe
from megacore.launch.worker import Assignment, call, work
from megacore.mesh.rank_info import RankInfo
from megacore.processes import usable_cores

SETTLE_S = 1.5  # after a failure, time for the other ranks to tell theirs: the first heard need not be the cause


@dataclass
class Rank:
    """A running process; `answer` is its exit code or how it failed, None while it runs."""

    process: BaseProcess
    connection: Connection
    answer: int | Failure | None = None


@dataclass
class Stop:
    """A wish to stop that came from outside: the first signal is passed on, a second one kills."""

    ranks: Sequence[Rank]
    signal: int = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        how = signal.SIGKILL if self.signal else signal.SIGTERM
        self.signal = self.signal or number
        for rank in self.ranks:
            if rank.process.is_alive() and rank.process.pid is not None:
                os.kill(rank.process.pid, how)


def run_local(
    target: str,
    args: tuple[Any, ...],
    nproc: int,
    write: Callable[[str], object] = sys.stderr.write,
    tell: Callable[[Failure], object] = lambda failure: None,
) -> int:
    """Calls `target` ("module:function") as `function(info, *args)` on `nproc` processes, `info` its RankInfo.

    Returns the largest exit code that the ranks return (None is 0; 75, stopped after saving, thus passes through). When
    a rank fails, the others are ended within seconds; `write` is given the cause as text, `tell` as it is, and the code
    is 2 if the user's input was wrong, else 1. SIGINT and SIGTERM reach every rank as one SIGTERM; if they die of it
    the code is 128 + the signal's number.
    One rank runs in this very process, so that debuggers and tracebacks work as ever: what it raises is not caught.
    """
    if nproc < 1:
        raise ValueError(f"--nproc={nproc} must be at least 1")
    if nproc == 1:
        return call(target, RankInfo(), args)
    with tempfile.TemporaryDirectory(prefix="megacore-", ignore_cleanup_errors=True) as folder:
        ranks: list[Rank] = []
        try:
            with passing_on_signals(Stop(ranks)) as stop:
                for assignment in assignments(target, args, nproc, f"file://{folder}/store"):
                    ranks.append(start(assignment))
                watch(ranks)
        finally:
            for rank in ranks:
                if rank.answer is None or isinstance(rank.answer, Failure):
                    rank.process.kill()
                rank.process.join()
                rank.connection.close()
    return verdict(ranks, stop.signal, write, tell)


def assignments(target: str, args: tuple[Any, ...], nproc: int, rendezvous: str) -> Iterator[Assignment]:
    """One for each rank; they share this process' cores."""
    for rank in range(nproc):
        info = RankInfo(rank, nproc, rank, nproc, rendezvous)
        yield Assignment(target, args, info, max(1, usable_cores() // nproc))


def start(assignment: Assignment) -> Rank:
    """Forks one rank from the server, which is started by the first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    with sigterm_ignored():
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
    ranks: Sequence[Rank], stopped_by: int, write: Callable[[str], object], tell: Callable[[Failure], object]
) -> int:
    """The exit code of the whole; the cause of a failure is written."""
    failures = [rank.answer for rank in ranks if isinstance(rank.answer, Failure)]
    if stopped_by and failures:
        return 128 + stopped_by
    if failures:
        first = cause(failures)
        width = max(60, min(120, shutil.get_terminal_size().columns))
        write(describe(first, len(ranks), width) + "\n")
        tell(first)
        return 2 if first.is_user_error else 1
    return max(rank.answer for rank in ranks if isinstance(rank.answer, int))


@contextmanager
def passing_on_signals(stop: Stop) -> Iterator[Stop]:
    """SIGINT and SIGTERM go to `stop` meanwhile; Python allows this in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_ignored() -> Iterator[None]:
    """A process started meanwhile ignores SIGTERM. A scheduler sends it to all processes of a job: the fork server
    must outlive it, or the ranks would go down with it before they could save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
