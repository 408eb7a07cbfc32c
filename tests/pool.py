"""Long-lived worker processes on which tests run small distributed jobs.

Importing torch takes seconds and a fork takes milliseconds, so the workers are forked from one server process
that has torch loaded, and they live as long as the test session. Each job gets a fresh gloo group, made from a
fresh file and destroyed afterwards, so no job sees another one's messages.
"""

import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

GRACE_S = 5.0  # how long the other ranks may take to notice that one of them has failed


class JobFailed(AssertionError):
    """A job's ranks that failed, each with its traceback, the first to fail first."""


@dataclass(frozen=True)
class Job:
    """What one rank of a job is told. The function travels by name: the worker imports it."""

    module: str
    function: str
    args: bytes
    rank: int
    world_size: int
    store: str
    timeout_s: float
    path: list[str]


@dataclass
class Worker:
    """A process of the pool and the parent's end of its pipe."""

    process: BaseProcess
    connection: Connection


class WorkerPool:
    """Runs `function(rank, *args)` on `world_size` processes that share a gloo group.

    A pool grows to the largest world size asked for. With `world_size` 1 no process group is made.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed"])
        self._workers: list[Worker] = []

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """Results of all ranks, in order of ranks.

        `function` is a top-level function of an importable module; arguments and results are pickled.
        Raises `JobFailed` with the tracebacks of the ranks that raised, died or ran beyond `timeout_s` seconds.
        """
        while len(self._workers) < world_size:
            self._workers.append(self._start_worker())
        workers = self._workers[:world_size]
        with tempfile.TemporaryDirectory(prefix="megacore-test-") as folder:
            store = os.path.join(folder, "store")
            packed = pickle.dumps(args)
            for rank, worker in enumerate(workers):
                worker.connection.send(
                    Job(
                        function.__module__, function.__qualname__, packed, rank, world_size, store, timeout_s, sys.path
                    )
                )
            results, failures = self._collect(workers, timeout_s)
        if failures:
            raise JobFailed("\n".join(f"rank {rank} of {world_size}:\n{text}" for rank, text in failures))
        return results

    def close(self) -> None:
        """Ends all workers; they leave by themselves when their pipe closes."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(GRACE_S)
            if worker.process.is_alive():
                worker.process.kill()
        self._workers = []

    def _start_worker(self) -> Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def _collect(self, workers: list[Worker], timeout_s: float) -> tuple[list[Any], list[tuple[int, str]]]:
        """Waits for the answer of every rank; a worker that gives none in time is replaced."""
        deadline = time.monotonic() + timeout_s
        results: list[Any] = [None] * len(workers)
        failures: list[tuple[int, str]] = []
        waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    done, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    workers[rank].process.join(GRACE_S)
                    done, value = False, f"the process died with exit code {workers[rank].process.exitcode}"
                    self._replace(rank)
                if done:
                    results[rank] = value
                else:
                    failures.append((rank, value))
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in waiting.values():
            failures.append((rank, f"no answer (limit of the job: {timeout_s} s); the process was killed"))
            self._replace(rank)
        return results, failures

    def _replace(self, rank: int) -> None:
        worker = self._workers[rank]
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self._workers[rank] = self._start_worker()


def serve(connection: Connection) -> None:
    """A worker's life: one job after another until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, run_job(job))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


def leave_with_parent() -> None:
    """Ends this process, whatever it is busy with, once the test session is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_job(job: Job) -> Any:
    """One rank's part of a job."""
    from torch import distributed

    sys.path[:] = job.path
    function = importlib.import_module(job.module)
    for name in job.function.split("."):
        function = getattr(function, name)
    args = pickle.loads(job.args)
    if job.world_size == 1:
        return function(job.rank, *args)
    store = distributed.FileStore(job.store, job.world_size)
    limit = timedelta(seconds=job.timeout_s)
    distributed.init_process_group("gloo", store=store, rank=job.rank, world_size=job.world_size, timeout=limit)
    try:
        distributed.barrier()  # who is done at once would close connections that the slowest is still making
        return function(job.rank, *args)
    finally:
        if distributed.is_initialized():  # whole runs leave by themselves
            distributed.destroy_process_group()
