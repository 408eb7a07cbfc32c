"""What the ranks of the launcher's tests do."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from megacore.layout.layout import Layout
from megacore.mesh import process_group
from megacore.mesh.collectives import all_reduce
from megacore.mesh.group import Group
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.rank_info import RankInfo


def meet(info: RankInfo) -> Group:
    process_group.start(info, torch.device("cpu"), timeout_s=60)
    return ParallelMesh.build(Layout(tp=info.world_size), info.rank, torch.device("cpu")).tp


def write_sum(info: RankInfo, folder: str) -> None:
    """Each rank leaves what it computed and how many threads it had."""
    total = all_reduce(torch.tensor([info.rank + 1.0]), meet(info)).item()
    Path(folder, str(info.rank)).write_text(f"{total} {torch.get_num_threads()}")
    process_group.stop()


def raise_on_one(info: RankInfo, seconds: float) -> None:
    group = meet(info)
    if info.rank == 1:
        time.sleep(seconds)
        raise KeyError("the cause")
    all_reduce(torch.zeros(1), group)


def die_on_one(info: RankInfo) -> None:
    group = meet(info)
    if info.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    all_reduce(torch.zeros(1), group)


def user_error_on_all(info: RankInfo) -> None:
    Layout(order=("tp", "pp"))


def one_hangs(info: RankInfo) -> None:
    if info.rank == 1:
        raise OSError("disk full")
    time.sleep(600)


def leave_with(info: RankInfo, codes: list[int]) -> int:
    return codes[info.rank]


def exit_with(info: RankInfo, codes: list[int]) -> None:
    sys.exit(codes[info.rank])


def sleep_and_tell(info: RankInfo, folder: str, save_on_term: bool) -> int:
    """Sleeps until told to stop; with `save_on_term` it then leaves as a trainer does."""
    stopped: list[int] = []
    if save_on_term:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: stopped.append(number))
    Path(folder, f"{info.rank}.pid").write_text(str(os.getpid()))
    while not stopped:
        time.sleep(0.02)
    time.sleep(0.3)  # it saves
    return 75


def fail_with(info: RankInfo, error: Exception) -> None:
    raise error


def fail_inside_a_schedule(info: RankInfo, folder: str, dies: bool) -> None:
    """The second of three pipeline ranks fails in the middle of a step, while the others send to it and wait for it."""
    from tests.engine.common import built_rank, run_config, step_of

    process_group.start(info, torch.device("cpu"), timeout_s=60)
    built = built_rank(info.rank, info.world_size, run_config(info.world_size, "parallel.pp=3"))
    step_of(built, 1)
    if info.rank == 1:
        calls = iter(range(100))

        def fail(*ignored: object) -> None:
            if next(calls) == 2:
                Path(folder, "failed").write_text(str(time.time()))
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise FloatingPointError("the cause inside the schedule")

        built.stages[1].register_forward_pre_hook(fail)
    step_of(built, 2)
    Path(folder, f"ended{info.rank}").touch()


def need_too_much(info: RankInfo) -> None:
    """One rank may have so much memory, and asks for more than that."""
    group = meet(info)
    if info.rank == 1:
        limit = 8 << 30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.empty(2 * limit, dtype=torch.uint8).fill_(1)
    all_reduce(torch.zeros(1), group)
