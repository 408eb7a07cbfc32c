"""The same work on several files, one after the other or in several processes, with word of how far it is."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from megacore.processes import usable_cores

Result = TypeVar("Result")
Job = TypeVar("Job")
Report = Callable[[int], Any]
"""Told of bytes that were written since it was told last."""

PAUSE_S = 0.2
MAX_WORKERS = 8
SMALL_BYTES = 1 << 28
"""Of a conversion that is done before a worker has started."""


def workers_for(num_bytes: int, wanted: int) -> int:
    """How many processes convert so many bytes: as many as ``wanted``; 0: a core each, at most 8, if it is worth it."""
    if wanted:
        return wanted
    return min(MAX_WORKERS, usable_cores()) if num_bytes >= SMALL_BYTES else 1


def do_all(
    work: Callable[[Job, Report], Result], jobs: Sequence[Job], num_workers: int, report: Report
) -> list[Result]:
    """What ``work`` makes of each job, in order. With more than one worker, jobs and results must be picklable.

    Raises what a job raised, and ValueError where a worker was killed, as for want of memory.
    """
    if num_workers <= 1 or len(jobs) <= 1:
        return [work(job, report) for job in jobs]
    context = multiprocessing.get_context("forkserver")
    # one process is made per worker, whatever the number of files
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(min(num_workers, len(jobs)), context, torch.set_num_threads, (1,)) as pool,
    ):
        queue = manager.Queue()
        futures = [pool.submit(work, job, queue.put) for job in jobs]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, PAUSE_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                while not queue.empty():
                    report(queue.get())
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise ValueError("a worker was killed, perhaps for want of memory; use fewer --workers") from None
        except ValueError as reason:
            raise ValueError(str(reason)) from None
        finally:
            pool.shutdown(cancel_futures=True)
