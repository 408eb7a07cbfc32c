"""Collectives of megacore/mesh/gloo.py against gloo's own, in one run: ratios, not absolute times.

    python benchmarks/collectives.py [--ranks 2 4] [--kib 16 256 4096 16384] [--repeats 10]

Each cell: time of gloo's primitive / time of ours (above 1: ours is faster), of the best and (of the median) call.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megacore.launch.processes import run_local
from megacore.layout.layout import Layout
from megacore.mesh import collectives, process_group
from megacore.mesh.group import Group
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.rank_info import RankInfo

NAMES = ("all_reduce", "all_gather", "reduce_scatter")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Contest = tuple[Callable[[], object], Callable[[], object]]


def contests(x: Tensor, group: Group) -> dict[str, Contest]:
    """For each collective: gloo's own and ours, on tensors of x's size [n] as the formulas count it.

    Where ours returns a new tensor, gloo's is given one that is just as new.
    """
    part = x[: x.numel() // group.size].clone()
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    return {
        "all_reduce": (lambda: distributed.all_reduce(x), lambda: collectives.all_reduce(x, group)),
        "all_gather": (lambda: gather(torch.empty_like(x), part), lambda: collectives.all_gather(part, group)),
        "reduce_scatter": (
            lambda: scatter(torch.empty_like(part), x),
            lambda: collectives.reduce_scatter(x, group),
        ),
    }


def seconds(action: Callable[[], object]) -> float:
    """Time of one call on this rank, all ranks having begun together."""
    distributed.barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def contest(name: str, size_kib: int, dtype: torch.dtype, group: Group, repeats: int) -> tuple[float, float]:
    """Ratios gloo's / ours of the best and of the median of `repeats` alternating calls."""
    native, ours = contests(torch.zeros(size_kib * 1024 // dtype.itemsize, dtype=dtype), group)[name]
    times = [(seconds(native), seconds(ours)) for _ in range(repeats + 1)][1:]  # the first is a warm-up
    theirs_s, ours_s = zip(*times)
    return min(theirs_s) / min(ours_s), statistics.median(theirs_s) / statistics.median(ours_s)


def measure(info: RankInfo, sizes_kib: list[int], repeats: int) -> None:
    """One rank's part; rank 0 prints a row per size, geometric means over the dtypes: best (median)."""
    process_group.start(info, torch.device("cpu"))
    group = ParallelMesh.build(Layout(tp=info.world_size), info.rank, torch.device("cpu")).tp
    for size_kib in sizes_kib:
        cells = []
        for name in NAMES:
            ratios = [contest(name, size_kib, dtype, group, repeats) for dtype in DTYPES]
            best, median = (statistics.geometric_mean(column) for column in zip(*ratios))
            cells.append(f"{best:.1f} ({median:.1f})")
        if info.rank == 0:
            print(f"| {size_kib} KiB | {info.world_size} | " + " | ".join(cells) + " |", flush=True)
    process_group.stop()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes")
    parser.add_argument("--kib", type=int, nargs="+", default=[16, 256, 4096, 16384], help="sizes of the whole tensor")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each")
    args = parser.parse_args(argv)
    print("| tensor | ranks | " + " | ".join(NAMES) + " |\n|---|---|---|---|---|", flush=True)
    codes = [run_local("benchmarks.collectives:measure", (args.kib, args.repeats), ranks) for ranks in args.ranks]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
