"""The worker pool itself: results per rank, shown failures, replaced workers."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from torch import distributed

from tests.pool import JobFailed, WorkerPool


def add_ranks(rank: int, offset: int) -> tuple[int, float]:
    total = torch.tensor([float(rank)])
    distributed.all_reduce(total)
    return rank + offset, total.item()


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise KeyError("the cause")
    distributed.barrier()


def die_on_one(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def sleep_on_one(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def has_group(rank: int) -> bool:
    return distributed.is_initialized()


def test_results_come_in_order_of_ranks(pool: WorkerPool) -> None:
    assert pool.run(add_ranks, 3, 10) == [(10, 3.0), (11, 3.0), (12, 3.0)]
    assert pool.run(add_ranks, 2, 0) == [(0, 1.0), (1, 1.0)]


def test_one_rank_has_no_process_group(pool: WorkerPool) -> None:
    assert pool.run(has_group, 1) == [False]


@pytest.mark.parametrize(("job", "cause"), [(fail_on_one, "KeyError: 'the cause'"), (die_on_one, "exit code -9")])
def test_a_failing_rank_shows_its_cause_and_the_pool_lives_on(
    pool: WorkerPool, job: Callable[[int], None], cause: str
) -> None:
    with pytest.raises(JobFailed) as caught:
        pool.run(job, 2)
    of_rank_1 = str(caught.value).partition("rank 1 of 2:")[2]
    assert cause in of_rank_1
    assert pool.run(add_ranks, 2, 0) == [(0, 1.0), (1, 1.0)]


def test_a_rank_that_does_not_answer_is_replaced(pool: WorkerPool) -> None:
    with pytest.raises(JobFailed, match="rank 1 of 2:\nno answer"):
        pool.run(sleep_on_one, 2, timeout_s=2.0)
    assert pool.run(add_ranks, 2, 0) == [(0, 1.0), (1, 1.0)]
