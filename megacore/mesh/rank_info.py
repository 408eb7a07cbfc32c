"""Who a process is among those of its run, and where they meet. Imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

DIGITS = 18
"""Of the largest number that a launcher may count with; Python itself refuses thousands of them."""


@dataclass(frozen=True)
class RankInfo:
    """A process' place. `rendezvous` is an address that torch.distributed understands:
    `file:///path`, `tcp://host:port`, or `env://` where torchrun keeps the store. One process needs none.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    rendezvous: str = ""
    host: str = ""
    """Where rank 0 is, if that may be another machine."""

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise ValueError(
                f"rank {self.rank} of {self.world_size} (local {self.local_rank} of {self.local_world_size}) is no "
                "place in a run; check RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
            )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "RankInfo | None":
        """The place that torchrun or a Slurm step gave this process; None if it was started alone.

        Raises ValueError where the variables are incomplete or contradict each other.
        """
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return _from_torchrun(environ)
        # Only srun sets this one: a batch script or an salloc shell is one process, whatever SLURM_NTASKS says.
        if _integer(environ, "SLURM_STEP_NUM_TASKS", "1") > 1:
            return _from_slurm(environ)
        return None


def _from_torchrun(environ: Mapping[str, str]) -> RankInfo:
    world_size = _integer(environ, "WORLD_SIZE")
    if world_size > 1 and not ("MASTER_ADDR" in environ and "MASTER_PORT" in environ):
        raise ValueError(
            f"WORLD_SIZE={world_size} is set but MASTER_ADDR or MASTER_PORT is not; start with torchrun, or set "
            "both to an address and a free port of the node of rank 0"
        )
    if "MASTER_PORT" in environ:
        _port(environ)
    return RankInfo(
        rank=_integer(environ, "RANK"),
        world_size=world_size,
        local_rank=_integer(environ, "LOCAL_RANK", "0"),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", str(_integer(environ, "LOCAL_RANK", "0") + 1)),
        rendezvous="env://",
        host=environ.get("MASTER_ADDR", ""),
    )


def _from_slurm(environ: Mapping[str, str]) -> RankInfo:
    tasks = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1")))
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    address = environ.get("MASTER_ADDR", first_host(nodes))
    # All tasks of a job derive the same port, and two jobs that share a node nearly always different ones.
    port = _port(environ) if "MASTER_PORT" in environ else 20000 + _integer(environ, "SLURM_JOB_ID", "0") % 10000
    node = _integer(environ, "SLURM_NODEID", "0")
    if node >= len(tasks):
        raise ValueError(
            f"environment variable SLURM_NODEID={node} is beyond the {len(tasks)} nodes of this step; srun sets it"
        )
    return RankInfo(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks[node],
        rendezvous=f"tcp://{address}:{port}",
        host=address,
    )


def _integer(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None or not text.isdecimal() or len(text) > DIGITS:
        raise ValueError(f"environment variable {name}={text} must be a whole number; the launcher sets it")
    return int(text)


def _port(environ: Mapping[str, str]) -> int:
    port = _integer(environ, "MASTER_PORT")
    if port > 65535:
        raise ValueError(f"environment variable MASTER_PORT={port} must be a port, at most 65535; the launcher sets it")
    return port


def expand_counts(text: str) -> list[int]:
    """Slurm's counts per node: `"4(x2),3"` is [4, 4, 3]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,9})\))?", part)
        if match is None:
            raise ValueError(f"tasks per node {text!r} is not of Slurm's form, such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list: `"gpu[003-007,9],login"` begins with gpu003."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?([^,\[]*)", nodes)
    if match is None:
        raise ValueError(f"node list {nodes!r} names no host")
    prefix, number, _ = match.groups()
    suffix = re.match(r"[^\]]*\]([^,\[]*)", nodes[match.end(2) :]) if number else None
    return prefix + (number or "") + (suffix[1] if suffix else "")
