"""Start and stop: who meets, who differs, and addresses that do not work."""

import socket
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import distributed

from megacore.launch.failures import Failure
from megacore.mesh import meeting, process_group
from megacore.mesh.meeting import PortInUse, RanksMissing
from megacore.mesh.rank_info import RankInfo, expand_counts, first_host
from tests.pool import JobFailed, WorkerPool

CPU = torch.device("cpu")


def place(rank: int, size: int, rendezvous: str) -> RankInfo:
    return RankInfo(rank, size, rank, size, rendezvous)


def start_and_stop(rank: int, size: int, rendezvous: str, hashes: list[str]) -> tuple[str, float]:
    """In a worker of the pool, whose own group steps aside, once all have it: else the slowest finds it gone."""
    distributed.barrier()
    distributed.destroy_process_group()
    try:
        process_group.start(place(rank, size, rendezvous), CPU, hashes[rank], timeout_s=20)
        x = torch.ones(1)
        distributed.all_reduce(x)
        return distributed.get_backend(), x.item()
    finally:
        process_group.stop()
        assert not distributed.is_initialized()
        distributed.init_process_group(
            "gloo", store=distributed.HashStore(), rank=0, world_size=1
        )  # for the pool to end


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("kind", ["file", "tcp"])
def test_ranks_meet(pool: WorkerPool, kind: str, tmp_path: Any) -> None:
    rendezvous = f"file://{tmp_path}/store" if kind == "file" else f"tcp://127.0.0.1:{free_port()}"
    assert pool.run(start_and_stop, 3, 3, rendezvous, ["same"] * 3) == [("gloo", 3.0)] * 3


@pytest.mark.parametrize("kind", ["file", "tcp"])
def test_a_rank_with_another_run_is_named_on_all(pool: WorkerPool, kind: str, tmp_path: Any) -> None:
    rendezvous = f"file://{tmp_path}/store" if kind == "file" else f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(JobFailed) as caught:
        pool.run(start_and_stop, 3, 3, rendezvous, ["same", "same", "other"])
    for rank in range(3):
        assert f"the run of rank 2 differs from that of rank 0 (this is rank {rank})" in str(caught.value)


def test_a_port_in_use_is_the_users_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rendezvous = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(PortInUse, match=f"{rendezvous} is in use on this machine; choose a free one") as caught:
            process_group.start(place(0, 2, rendezvous), CPU, timeout_s=5)
    assert Failure.of_exception(0, caught.value).is_user_error


def fail_to_start(rank: int, size: int, rendezvous: str, absent: list[int], timeout_s: float) -> Failure | None:
    """Ranks that are absent do nothing; what the others would tell their launcher."""
    if rank in absent:
        return None
    try:
        process_group.start(RankInfo(rank, size, rank % 2, 2, rendezvous, "127.0.0.1"), CPU, timeout_s=timeout_s)
    except Exception as error:
        return Failure.of_exception(rank, error)
    raise AssertionError("the ranks have met")


def test_who_does_not_come_is_named_once(pool: WorkerPool) -> None:
    rendezvous = f"tcp://127.0.0.1:{free_port()}"
    absent, host = [1, 3], socket.gethostname()
    first, _, second, _ = pool.run(fail_to_start, 4, 4, rendezvous, absent, 0.5)
    assert first and first.title == "RanksMissing" and not first.is_follow_up and not first.is_user_error
    assert f"of 4 ranks 1, 3 did not come to {rendezvous} within 0.5 s; there are 0, 2 on {host}. Look" in first.message
    assert second and second.is_follow_up, "it is told by rank 0"


def test_rank_0_does_not_come(pool: WorkerPool) -> None:
    """The first rank of each node says it."""
    rendezvous = f"tcp://127.0.0.1:{free_port()}"
    _, follower, first, _ = pool.run(fail_to_start, 4, 4, rendezvous, [0, 3], 0.3)
    text = f"rank 0 of 4 was not to be reached at {rendezvous} from {socket.gethostname()} within 0.3 s; look at"
    assert first and first.title == "RanksMissing" and not first.is_follow_up and text in first.message
    assert follower and follower.is_follow_up


def test_something_else_answers() -> None:
    def greet() -> None:
        with suppress(OSError):
            while True:
                server.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=greet, daemon=True).start()
        rendezvous = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(RanksMissing, match="within 0.3 s; what answers there is something else"):
            process_group.start(RankInfo(1, 2, 0, 1, rendezvous), CPU, timeout_s=0.3)


def test_ranks_of_a_node_tell_where_the_missing_one_is() -> None:
    """Torchrun deals ranks node by node; of what others deal nothing is guessed."""
    info = RankInfo(0, 8, 0, 2, "env://", "gpu1")
    came = {0: "gpu1 0 2", 1: "gpu1 0 2", 2: "gpu2 2 2", 6: "gpu4 -1 2"}
    text = meeting.missing(came, info, 600.0)
    assert "of 8 ranks 3 (on gpu2), 4-5, 7 did not come to gpu1 (MASTER_ADDR) within 600 s" in text
    assert "there are 0-1 on gpu1, 2 on gpu2, 6 on gpu4." in text


def test_one_process_starts_nothing() -> None:
    process_group.start(RankInfo(), CPU)
    assert not distributed.is_initialized()
    process_group.stop()


def test_devices() -> None:
    assert process_group.device_of(RankInfo(), "cpu") == CPU
    if torch.cuda.device_count() == 0:
        assert process_group.device_of(RankInfo(), "auto") == CPU
        with pytest.raises(ValueError, match="local rank 0 finds 0 GPUs"):
            process_group.device_of(RankInfo(), "cuda")


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_ID": "123456",
}


def test_places_from_the_environment() -> None:
    assert RankInfo.from_environment({}) is None
    assert RankInfo.from_environment(TORCHRUN) == RankInfo(5, 8, 1, 4, "env://", "a")
    assert RankInfo.from_environment(SLURM) == RankInfo(5, 7, 1, 3, "tcp://gpu007:23456", "gpu007")
    assert RankInfo.from_environment(SLURM | {"MASTER_ADDR": "b", "MASTER_PORT": "9"}) == RankInfo(
        5, 7, 1, 3, "tcp://b:9", "b"
    )
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}
    assert RankInfo.from_environment(batch_script) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8 .* is no place in a run"),
        (TORCHRUN | {"RANK": "x"}, "RANK=x must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR or MASTER_PORT is not"),
    ],
)
def test_wrong_environments_are_explained(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankInfo.from_environment(environ)


def test_slurms_notations() -> None:
    assert expand_counts("4(x2),3") == [4, 4, 3]
    assert [first_host(nodes) for nodes in ("a", "a,b", "gpu[003-007,9],x", "r[1-2]n4,x", "n-7,n-8")] == [
        "a",
        "a",
        "gpu003",
        "r1n4",
        "n-7",
    ]
