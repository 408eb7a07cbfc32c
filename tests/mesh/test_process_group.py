"""Start and stop: who meets, who differs, and addresses that do not work."""

import socket
from typing import Any

import pytest
import torch
from torch import distributed

from megacore.mesh import process_group
from megacore.mesh.rank_info import RankInfo, expand_counts, first_host
from tests.pool import JobFailed, WorkerPool

CPU = torch.device("cpu")


def place(rank: int, size: int, rendezvous: str) -> RankInfo:
    return RankInfo(rank, size, rank, size, rendezvous)


def start_and_stop(rank: int, size: int, rendezvous: str, hashes: list[str]) -> tuple[str, float]:
    """In a worker of the pool, whose own group steps aside."""
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
        with pytest.raises(ValueError, match=f"{rendezvous} is in use on this machine; choose a free one"):
            process_group.start(place(0, 2, rendezvous), CPU, timeout_s=5)


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
