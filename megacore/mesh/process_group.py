"""Starts and stops torch.distributed for this process."""

import gc
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store

from megacore.mesh.meeting import meet
from megacore.mesh.rank_info import RankInfo


def device_of(info: RankInfo, kind: str = "auto") -> torch.device:
    """The device of this process: `cpu`, or the GPU of its local rank; `auto` takes the GPU where there is one.

    Raises ValueError if a GPU is asked for and there is none for this local rank.
    """
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if info.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"train.device={kind}: local rank {info.local_rank} finds {torch.cuda.device_count()} GPUs on its node; "
            "start one process per GPU, or set train.device=cpu"
        )
    return torch.device("cuda", info.local_rank)


def start(info: RankInfo, device: torch.device, config_hash: str = "", timeout_s: float = 600.0) -> None:
    """Joins the other processes: gloo on CPU, NCCL on CUDA (not yet run on a GPU).

    Before the first collective all ranks compare `config_hash`, a digest of the resolved run: ranks that disagree
    would hang or compute nonsense. Raises ValueError on every rank, naming those that differ from rank 0.
    A run of one process starts nothing. `timeout_s` limits the wait for the others, who are named if they do not come
    (``meeting.meet``), and each collective.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if info.world_size == 1:
        return
    store = meet(info, timeout_s)
    compare_hashes(store, info, config_hash)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("collectives", store),
        rank=info.rank,
        world_size=info.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def stop() -> None:
    """Leaves the other processes. Without a process group it does nothing.

    Whoever held groups must have let go of them: gloo's threads end with the last reference, and one that still runs
    when the interpreter ends aborts the process (seen in one of ten runs). Cycles are collected here for that.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()


def compare_hashes(store: Store, info: RankInfo, config_hash: str) -> None:
    """Rank 0 reads all ranks' hashes and tells all of them which differ from its own."""
    store.set(f"config/{info.rank}", config_hash)
    if info.rank == 0:
        others = range(1, info.world_size)
        different = [str(rank) for rank in others if store.get(f"config/{rank}").decode() != config_hash]
        store.set("config/different", ",".join(different))
    different_ranks = store.get("config/different").decode()
    if different_ranks:
        # Rank 0 may be the store's server: it stays until everybody has read the verdict.
        store.set(f"config/read/{info.rank}", "")
        if info.rank == 0:
            store.wait([f"config/read/{rank}" for rank in range(info.world_size)])
        raise ValueError(
            f"the run of rank {different_ranks} differs from that of rank 0 (this is rank {info.rank}); start all "
            "ranks with the same run file, overrides and version of megacore"
        )
