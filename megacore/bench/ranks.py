"""What every benchmark of training does around its timing: meet, gather, keep the slowest rank's, part."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed

from megacore.bench.harness import slowest_rank
from megacore.mesh import process_group
from megacore.mesh.rank_info import RankInfo


def time_on_all(info: RankInfo, num_threads: int, sides: Callable[[], dict[str, list[float]]], result: str) -> None:
    """Every rank times its ``sides`` (seconds by name and round); rank 0 writes the slowest's to JSON ``result``."""
    torch.set_num_threads(num_threads)
    process_group.start(info, torch.device("cpu"))
    try:
        seconds = sides()
        every_rank = [seconds] * info.world_size
        if info.world_size > 1:
            distributed.all_gather_object(every_rank, seconds)
        if info.rank == 0:
            Path(result).write_text(json.dumps(slowest_rank(every_rank)))
    finally:
        process_group.stop()  # with all that held groups gone
